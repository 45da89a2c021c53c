"""A server that speaks chat completions, as well or as badly as a test wants."""

import json
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(text, logprobs=None, **usage):
    choice = {"message": {"role": "assistant", "content": text}, "logprobs": logprobs}
    return {"choices": [choice], "usage": {"prompt_tokens": 10, "completion_tokens": 2} | usage}


@contextmanager
def serving():
    """Gives serve(reply) -> a running Server."""
    servers = []

    def serve(reply):
        server = Server(reply)
        threading.Thread(target=server.http.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return server

    yield serve
    for server in servers:
        server.over.set()
        server.http.shutdown()
        server.http.server_close()


class Server:
    """`reply(question, n)` is asked for what to send on the n-th request (from 1) of a question: a dict (JSON), bytes,
    (status, headers, body), or a function of the handler."""

    def __init__(self, reply):
        self.asked: Counter = Counter()
        self.bodies, self.headers = [], []
        self.now = self.most = 0
        self.over = threading.Event()
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                question = body["messages"][-1]["content"]
                with lock:
                    server.asked[question] += 1
                    n = server.asked[question]
                    server.bodies.append(body)
                    server.headers.append(dict(self.headers))
                    server.now += 1
                    server.most = max(server.most, server.now)
                try:
                    self.send(reply(question, n))
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True
                finally:
                    with lock:
                        server.now -= 1

            def send(self, what):
                if callable(what):
                    return what(self)
                status, headers, data = what if isinstance(what, tuple) else (200, {}, what)
                data = data if isinstance(data, bytes) else json.dumps(data).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
                return None

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.block_on_close = False
        self.http.handle_error = lambda *args: None  # a client that hung up
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
