"""Text to ids and back, behind one small interface: SentencePiece models and Hugging Face tokenizer.json.

`encode` never adds a special token; whoever builds an example adds BOS and EOS (`batching.py`), so the rule
is in one place for training and generation. A rendered conversation is different: its chat template has
written every special token, and `encode_rendered` reads them.
"""

import hashlib
import io
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from jrlhf.config import UserError, did_you_mean
from jrlhf.data.chat import BUILT_IN, ChatConfig, ChatTemplate, pick_template
from jrlhf.rollout.stops import TokenBytes

# Files beside a tokenizer that name its special tokens. They are read on loading and kept on saving.
SIDECARS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
CHAT_TEMPLATE = "chat_template.jinja"  # outranks the field `chat_template` of tokenizer_config.json
WRAP = "jrlhf_wrap_strings"  # our field in tokenizer_config.json: ChatConfig.wrap_strings
TEMPLATE_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # a template may name `<...>_token`


class Rendered(NamedTuple):
    """A rendered conversation as ids. T tokens."""

    ids: list[int]
    starts: list[int]  # [T] where each token's text begins, in characters


class Tokenizer:
    """A tokenizer and its special ids.

    `eos_ids` are all ids that end a text when sampled; `eos_ids[0]` is the one that training texts end with.
    `pad_id` falls back to `eos_ids[0]` where the files name no padding: it fills slots that masks exclude,
    and no mask may be computed from it. `bos_id` is None where there is none; `add_bos` says whether an
    encoded prompt starts with it.

    `chat_template` is None where the files have none. The token by which it ends the assistant's turn is one of
    `eos_ids` even if no file says so. `wrap_strings` says whether text prompts are user turns (`ChatConfig`).
    """

    file_name: ClassVar[str]
    bos_id: int | None
    add_bos: bool
    eos_ids: tuple[int, ...]
    pad_id: int
    chat_template: ChatTemplate | None
    wrap_strings: bool

    def __init__(self, blob: bytes, sidecars: dict[str, dict], where: str):
        self._blob, self._sidecars, self._where = blob, sidecars, where
        self._read_specials(where)
        self._read_template(where)
        specials = (self.bos_id, self.pad_id, *self.eos_ids)
        wrong = [i for i in specials if i is not None and not 0 <= i < self.vocab_size]
        if wrong:
            raise UserError(
                f"{where}: special token id {wrong[0]} is outside the {self.vocab_size} known ids."
            )
        self._specials = frozenset(specials)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, no special token added."""
        raise NotImplementedError

    def encode_rendered(self, text: str) -> Rendered:
        """Ids of a text in which a chat template wrote the special tokens, each of them one id; none is added."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; padding, BOS and EOS are skipped."""
        return self._decode([int(i) for i in ids if int(i) not in self._specials])

    def token_bytes(self) -> TokenBytes:
        """What each token writes, as bytes: the bytes that the tokens of a text write, one after another, are its.

        Padding, BOS and EOS write nothing. UserError where a token's text depends on its neighbours.
        """
        everything = range(self.vocab_size)
        alone = self._decode_each([[i] for i in everything])
        byte = [self._byte(i) for i in everything]
        before = next((i for i in everything if byte[i] is None and alone[i].isalnum()), None)
        if before is None:
            raise UserError(f"{self._where}: no token writes a word or a part of one. {_NO_STOP}")
        behind = [
            text.removeprefix(alone[before]) for text in self._decode_each([[before, i] for i in everything])
        ]
        # A byte of a longer character is no text by itself.
        part = [bytes([b]) if b is not None and b >= 0x80 else None for b in byte]
        first = [p or text.encode() for p, text in zip(part, alone, strict=True)]
        later = [p or text.encode() for p, text in zip(part, behind, strict=True)]
        changed = next((i for i in everything if first[i] and first[i] != later[i]), before)
        twice = self._decode_each([[i, changed] for i in everything])
        begins = [not first[i] and twice[i] == alone[changed] for i in everything]
        for i in [i for i in self._specials if i is not None]:
            first[i], later[i], begins[i] = b"", b"", True
        found = TokenBytes(later, first, begins)
        self._check_token_bytes(found, [i for i in everything if byte[i] is None])
        return found

    def _check_token_bytes(self, tokens: TokenBytes, ids: Sequence[int]) -> None:
        """UserError where texts of random tokens are not what the tokens write."""
        rng = np.random.default_rng(0)
        for row in rng.choice(ids, (256, 8)).tolist():
            begun = next((n for n, i in enumerate(row) if not tokens.begins[i]), len(row))
            parts = [tokens.first[i] for i in row[: begun + 1]] + [tokens.later[i] for i in row[begun + 1 :]]
            if b"".join(parts).decode("utf-8", "replace") != self.decode(row):
                raise UserError(f"{self._where}: what a token writes depends on its neighbours. {_NO_STOP}")

    @property
    def vocab_size(self) -> int:
        """Every id is below this."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """A hash of everything that decides which ids a text becomes."""
        specials: tuple = (self.pad_id, self.bos_id, self.eos_ids, self.add_bos)
        if self.chat_template is not None:
            specials += (self.chat_template.source, self.wrap_strings)
        return hashlib.sha256(self._blob + repr((self.file_name, specials)).encode()).hexdigest()[:16]

    def save(self, folder: str | Path) -> None:
        """Write the model and its sidecar files; `load_tokenizer(folder)` gives an equal tokenizer."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / self.file_name).write_bytes(self._blob)
        # The ids that were resolved on loading are written out, whichever file they came from.
        bos_eos_pad = {
            "bos_token_id": self.bos_id,
            "eos_token_id": [*self.eos_ids],
            "pad_token_id": self.pad_id,
        }
        generation = {**self._sidecars.get("generation_config.json", {}), **bos_eos_pad}
        for name, card in {**self._sidecars, "generation_config.json": generation}.items():
            if name in SIDECARS:
                (folder / name).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
        (folder / CHAT_TEMPLATE).unlink(missing_ok=True)
        if CHAT_TEMPLATE in self._sidecars:
            source = self._sidecars[CHAT_TEMPLATE]["chat_template"]
            (folder / CHAT_TEMPLATE).write_text(source, encoding="utf-8")

    def with_chat(self, config: ChatConfig) -> "Tokenizer":
        """This tokenizer with another chat format. UserError when it cannot write the format."""
        card = dict(self._sidecars.get("tokenizer_config.json", {}))
        cards = {k: v for k, v in self._sidecars.items() if k != CHAT_TEMPLATE or not config.template}
        if config.template:
            # Inference engines add nothing to what the template writes, so it must write BOS itself.
            bos = "{{- bos_token -}}" if config.template in BUILT_IN and self.add_bos else ""
            card["chat_template"] = bos + config.text()
        card[WRAP] = config.wrap_strings
        changed = type(self)(self._blob, {**cards, "tokenizer_config.json": card}, self._where)
        if changed.chat_template is None:
            raise UserError(f"chat.wrap_strings: {self._where} has no chat template. {CHOOSE_TEMPLATE}")
        return changed

    def _decode(self, ids: list[int]) -> str:
        raise NotImplementedError

    def _decode_each(self, rows: list[list[int]]) -> list[str]:
        """Each row's text."""
        raise NotImplementedError

    def _byte(self, i: int) -> int | None:
        """Which single byte the token stands for, None for one of text."""
        raise NotImplementedError

    def _lookup(self, token: str) -> int | None:
        raise NotImplementedError

    def _token(self, i: int) -> str:
        """The text by which a special token is written in a template."""
        raise NotImplementedError

    def _is_special(self, i: int) -> bool:
        """Whether `i` is a token that stands for itself, not a piece of words."""
        raise NotImplementedError

    def _own(self, name: str) -> int | None:
        """The id that the model itself names for "bos", "eos" or "pad"."""
        raise NotImplementedError

    def _starts_with_bos(self) -> bool:
        """What the model does where no sidecar says `add_bos_token`."""
        raise NotImplementedError

    def _read_specials(self, where: str) -> None:
        cards = self._sidecars
        token_cards, id_cards = SIDECARS[:2], ("generation_config.json", "config.json")

        def named(name: str) -> int | None:
            """The id of `<name>_token` in the first sidecar that has the field; null means none."""
            for card in token_cards:
                if f"{name}_token" in cards.get(card, {}):
                    token = cards[card][f"{name}_token"]
                    token = token.get("content") if isinstance(token, dict) else token
                    if token is not None and self._lookup(token) is None:
                        raise UserError(
                            f"{where}: {card} names {name}_token {token!r}, which is not a token."
                        )
                    return None if token is None else self._lookup(token)
            return self._own(name)

        def numbered(name: str, files: Sequence[str] = id_cards) -> list[int]:
            """The ids of `<name>_token_id`, an int or a list."""
            for card in files:
                found = cards.get(card, {}).get(f"{name}_token_id")
                if found is not None:
                    return [int(i) for i in (found if isinstance(found, list) else [found])]
            return []

        says_bos = any("bos_token" in cards.get(card, {}) for card in token_cards)
        self.bos_id = named("bos")
        if self.bos_id is None and not says_bos:  # an explicit null (Qwen) is an answer, not a gap
            self.bos_id = next(iter(numbered("bos")), None)

        # What generation stops at outranks what the tokenizer calls EOS: the two differ in real checkpoints.
        eos = named("eos")
        ends = numbered("eos", id_cards[:1]) or ([eos] if eos is not None else numbered("eos", id_cards[1:]))
        if not ends:
            raise UserError(f"{where}: no end-of-text token. Set eos_token_id in generation_config.json.")
        self._own_eos = eos
        self.eos_ids = self._own_first(ends)

        pad = named("pad")
        self.pad_id = pad if pad is not None else next(iter(numbered("pad", id_cards[:1])), self.eos_ids[0])

        add_bos = cards.get("tokenizer_config.json", {}).get("add_bos_token")
        if add_bos and self.bos_id is None:
            raise UserError(f"{where}: tokenizer_config.json sets add_bos_token but there is no BOS token.")
        starts = self.bos_id is not None and self._starts_with_bos()
        self.add_bos = bool(add_bos) if add_bos is not None else starts

    def _read_template(self, where: str) -> None:
        cards, folder = self._sidecars, Path(where).parent
        found = [
            name
            for name in (CHAT_TEMPLATE, "tokenizer_config.json")
            if "chat_template" in cards.get(name, {})
        ]
        source = pick_template(cards[found[0]]["chat_template"], str(folder / found[0])) if found else None
        self.wrap_strings = source is not None and bool(
            cards.get("tokenizer_config.json", {}).get(WRAP, False)
        )
        if source is None:
            self.chat_template = None
            return
        tokens = {}
        for name in (f"{n}_token" for n in TEMPLATE_TOKENS):
            holder = next((cards[c] for c in SIDECARS[:2] if cards.get(c, {}).get(name) is not None), None)
            if holder is not None:
                tokens[name] = holder[name]["content"] if isinstance(holder[name], dict) else holder[name]
        tokens.setdefault("eos_token", self._token(self.eos_ids[0]))
        if self.bos_id is not None:
            tokens.setdefault("bos_token", self._token(self.bos_id))
        self.chat_template = ChatTemplate(source, tokens, str(folder / found[0]))
        end = self._end_of_turn(self.chat_template)
        if end is not None and end not in self.eos_ids:
            self.eos_ids = self._own_first((*self.eos_ids, end))  # as it will be read after it was saved

    def _own_first(self, ends: Sequence[int]) -> tuple[int, ...]:
        """End tokens with what the tokenizer calls EOS in front, if it is among them: texts are ended by the first."""
        own = [i for i in ends if i == self._own_eos]
        return tuple(dict.fromkeys([*own, *ends]))

    def _end_of_turn(self, template: ChatTemplate) -> int | None:
        """The special token that the template writes after an assistant's words, or None."""
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        try:
            text = template.render(turns)
        except (
            UserError
        ):  # it wants other turns, or is broken: the first conversation that is encoded will tell
            return None
        ids = self.encode_rendered(text.rpartition("answer")[2]).ids
        return next((i for i in ids if self._is_special(i)), None)


CHOOSE_TEMPLATE = (
    f"Name a template in the stage's `chat.template`: {' or '.join(map(repr, BUILT_IN))}, or a .jinja file."
)


_NO_STOP = "Stop strings cannot be found token by token: leave `sampling.stop` empty."


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model`. Where no sidecar says otherwise, BOS is added if the model has one."""

    file_name = "tokenizer.model"

    def __init__(self, blob: bytes, sidecars: dict[str, dict], where: str = "tokenizer.model"):
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=blob)
        except (RuntimeError, OSError) as error:
            raise UserError(f"{where}: not a SentencePiece model ({error}).") from error
        super().__init__(blob, sidecars, where)

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def encode_rendered(self, text: str) -> Rendered:
        from sentencepiece.sentencepiece_pb2 import SentencePieceText  # type: ignore[attr-defined]  # made on import

        # SentencePiece itself takes control tokens (<s>, </s>) for plain characters.
        ids: list[int] = []
        starts: list[int] = []
        begin = 0
        for part in re.split(self._controls, text) if self._controls else [text]:
            if (control := self._lookup(part)) is not None and self._model.is_control(control):
                ids.append(control)
                starts.append(begin)
            else:
                found = SentencePieceText.FromString(self._model.encode(part, out_type="serialized_proto"))
                character = list(accumulate((len(c.encode()) for c in part), initial=0))  # its first byte
                ids += [piece.id for piece in found.pieces]
                starts += [begin + bisect_right(character, piece.begin) - 1 for piece in found.pieces]
            begin += len(part)
        return Rendered(ids, starts)

    @cached_property
    def _controls(self) -> str:
        """A pattern of all control tokens, longest first; "" when there is none."""
        found = [self._model.id_to_piece(i) for i in range(self.vocab_size) if self._model.is_control(i)]
        return f"({'|'.join(map(re.escape, sorted(found, key=len, reverse=True)))})" if found else ""

    @property
    def vocab_size(self) -> int:
        return self._model.get_piece_size()

    def _decode(self, ids: list[int]) -> str:
        # A model's vocabulary may be padded beyond the tokenizer's; those ids have no text.
        return self._model.decode([i for i in ids if i < self.vocab_size])

    def _decode_each(self, rows: list[list[int]]) -> list[str]:
        return self._model.decode(rows)

    def _byte(self, i: int) -> int | None:
        return _byte_of(self._model.id_to_piece(i)) if self._model.is_byte(i) else None

    def _lookup(self, token: str) -> int | None:
        found = self._model.piece_to_id(token)  # the unknown id for an unknown piece
        return found if self._model.id_to_piece(found) == token else None

    def _token(self, i: int) -> str:
        return self._model.id_to_piece(i)

    def _is_special(self, i: int) -> bool:
        return self._model.is_control(i) or i in self._symbols

    @cached_property
    def _symbols(self) -> frozenset[int]:
        """Ids of user-defined symbols, which the processor's own interface does not tell."""
        from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]  # made on import

        proto = ModelProto.FromString(self._blob)
        return frozenset(i for i, piece in enumerate(proto.pieces) if piece.type == piece.USER_DEFINED)

    def _own(self, name: str) -> int | None:
        found = {"bos": self._model.bos_id, "eos": self._model.eos_id, "pad": self._model.pad_id}[name]()
        return found if found >= 0 else None  # -1 is SentencePiece's "there is none"

    def _starts_with_bos(self) -> bool:
        return True


class JsonTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json`.

    Special tokens written out in a text (`<|im_start|>`) become their ids by `encode` too; the SentencePiece
    tokenizer's `encode` reads them as plain characters.
    """

    file_name = "tokenizer.json"

    def __init__(self, blob: bytes, sidecars: dict[str, dict], where: str = "tokenizer.json"):
        import tokenizers

        try:
            self._model = tokenizers.Tokenizer.from_str(blob.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception for a malformed file
            raise UserError(f"{where}: not a tokenizer.json ({error}).") from error
        # A file may carry the truncation and padding of the run that saved it, which would change ids.
        self._model.no_truncation()
        self._model.no_padding()
        super().__init__(blob, sidecars, where)

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def encode_rendered(self, text: str) -> Rendered:
        found = self._model.encode(text, add_special_tokens=False)
        return Rendered(found.ids, [start for start, _ in found.offsets])

    @property
    def vocab_size(self) -> int:
        return max(self._model.get_vocab().values()) + 1  # ids may have gaps, so not the count

    def _decode(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=True)

    def token_bytes(self) -> TokenBytes:
        if "ByteLevel" not in self._decoders:
            return super().token_bytes()
        added = self._model.get_added_tokens_decoder()
        silent = self._specials | {i for i, token in added.items() if token.special}

        def written(i: int) -> bytes:
            token = self._model.id_to_token(i)  # None in a gap between ids
            if token is None or i in silent:
                return b""
            spelled = all(c in _BYTE_LEVEL for c in token)
            return bytes(_BYTE_LEVEL[c] for c in token) if spelled else token.encode()

        texts = [written(i) for i in range(self.vocab_size)]
        found = TokenBytes(texts, texts, [not text for text in texts])
        self._check_token_bytes(found, range(self.vocab_size))
        return found

    def _decode_each(self, rows: list[list[int]]) -> list[str]:
        return self._model.decode_batch(rows, skip_special_tokens=True)

    def _byte(self, i: int) -> int | None:
        return _byte_of(self._model.id_to_token(i) or "") if "ByteFallback" in self._decoders else None

    @cached_property
    def _decoders(self) -> list[str]:
        """The kinds of decoder by which tokens become text."""
        decoder = json.loads(self._blob).get("decoder") or {}
        return [part["type"] for part in decoder.get("decoders", [decoder]) if part]

    def _lookup(self, token: str) -> int | None:
        return self._model.token_to_id(token)

    def _token(self, i: int) -> str:
        return str(self._model.id_to_token(i))

    def _is_special(self, i: int) -> bool:
        return i in self._added

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._model.get_added_tokens_decoder())

    def _own(self, name: str) -> int | None:
        return None  # tokenizer.json marks tokens as special without saying which is which

    def _starts_with_bos(self) -> bool:
        return self._model.encode("a").ids[:1] == [self.bos_id]


def _byte_of(piece: str) -> int | None:
    """Of the piece <0x0A>, 10."""
    return int(piece[3:5], 16) if re.fullmatch("<0x[0-9A-F]{2}>", piece) else None


def _byte_level() -> dict[str, int]:
    """The character by which byte-level BPE (Radford et al. 2019) writes each byte: itself where it can be seen."""
    seen = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("\u00a1"), ord("\u00ac") + 1),
        *range(ord("\u00ae"), 256),
    ]
    others = [b for b in range(256) if b not in seen]
    return {chr(b): b for b in seen} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTE_LEVEL = _byte_level()

_LOADERS: dict[str, Callable[..., Tokenizer]] = {
    ".json": JsonTokenizer,
    ".model": SentencePieceTokenizer,
}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a folder (`tokenizer.json` first, else `tokenizer.model`) or one of these files.

    The sidecar files in the same folder name the special tokens. Raises UserError when nothing fits.
    """
    path = Path(path)
    if path.is_dir():
        names = [
            n for n in (JsonTokenizer.file_name, SentencePieceTokenizer.file_name) if (path / n).exists()
        ]
        if not names:
            there = ", ".join(sorted(p.name for p in path.iterdir())) or "nothing"
            raise UserError(f"{path}: no tokenizer.json or tokenizer.model there; it holds {there}.")
        path = path / names[0]
    if not path.exists():
        raise UserError(f"{path}: no such tokenizer.{did_you_mean(path.name, _siblings(path))}")
    if path.suffix not in _LOADERS:
        raise UserError(f"{path}: a tokenizer is a folder, a .json or a .model file, not {path.suffix!r}.")
    cards: dict[str, Any] = {}
    for name in (*SIDECARS, "config.json"):
        if (path.parent / name).exists() and path.parent / name != path:
            try:
                cards[name] = json.loads((path.parent / name).read_text(encoding="utf-8"))
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise UserError(f"{path.parent / name}: not JSON ({error}).") from error
            if not isinstance(cards[name], dict):
                raise UserError(f"{path.parent / name}: expected a JSON object.")
    if (path.parent / CHAT_TEMPLATE).exists():
        cards[CHAT_TEMPLATE] = {"chat_template": (path.parent / CHAT_TEMPLATE).read_text(encoding="utf-8")}
    return _LOADERS[path.suffix](path.read_bytes(), cards, str(path))


def _siblings(path: Path) -> list[str]:
    return [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []


def train_sentencepiece(
    texts: Iterable[str],
    vocab_size: int,
    folder: str | Path,
    model_type: str = "unigram",
    symbols: Sequence[str] = (),
    byte_fallback: bool = False,
) -> SentencePieceTokenizer:
    """Train a SentencePiece model on `texts`, save it to `folder` and return it.

    Ids 0 to 3 are padding, BOS, EOS and unknown. `vocab_size` is an upper bound. `model_type` is "unigram",
    "bpe" or "word"; "word" gives one piece per whitespace-separated word, which is what a small readable
    vocabulary wants. Each of `symbols` is always one piece. `byte_fallback` spells unseen characters in
    bytes instead of the unknown id. Text is not normalised, but runs of spaces become one. The same texts
    give the same model: one thread, no sampling of sentences.
    """
    import sentencepiece

    if model_type not in ("unigram", "bpe", "word"):
        known = ("unigram", "bpe", "word")
        raise UserError(f"model_type: {model_type!r} is unknown.{did_you_mean(model_type, known)}")
    blob = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=blob,
            model_type=model_type,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            pad_piece="<pad>",
            user_defined_symbols=list(symbols),
            byte_fallback=byte_fallback,
            character_coverage=1.0,
            normalization_rule_name="identity",
            max_sentence_length=2**30,  # the default drops longer texts without a word
            num_threads=1,
            minloglevel=3,
        )
    except RuntimeError as error:
        what = "no text to train on" if "sentences_.empty" in str(error) else str(error).rpartition("] ")[2]
        raise UserError(f"train_sentencepiece(vocab_size={vocab_size}): {what}") from error
    card = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = SentencePieceTokenizer(blob.getvalue(), {"tokenizer_config.json": card}, str(folder))
    tokenizer.save(folder)
    return tokenizer
