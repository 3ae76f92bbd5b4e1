"""`streamr1 download` against a small imitation of the hub.

What is asked for, a dropped connection, the second attempt.
"""

import hashlib
import json
import os
import random
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

BYTES = random.Random(0).randbytes
FILES = {
    "a.safetensors": BYTES(3_000),
    "b.safetensors": BYTES(5_000),
    "README.md": b"not asked for",
}
COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """The routes of huggingface.co that a snapshot needs.

    It drops the connection in the middle of b.safetensors while `server.breaks`.
    """

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = self.path.split("?")[0]
        self.server.seen.append((self.command, path))
        if path.startswith("/api/models/"):
            about = {"id": "x/y", "sha": COMMIT, "siblings": [{"rfilename": n} for n in FILES]}
            tree = [
                {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                for n, d in FILES.items()
            ]
            data = json.dumps(tree if "/tree/" in path else about).encode()
            headers = {"Content-Type": "application/json"}
        else:
            data = FILES[path.split(f"/resolve/{COMMIT}/")[1]]
            headers = {"ETag": hashlib.sha1(data).hexdigest(), "X-Repo-Commit": COMMIT}
        self.send_response(200)
        for name, value in {**headers, "Content-Length": len(data)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if body:
            breaks = self.server.breaks and path.endswith("b.safetensors")
            self.wfile.write(data[:2_000] if breaks else data)


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen, server.breaks = [], True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.mark.slow
def test_a_dropped_connection_ends_with_one_line_and_the_second_attempt_fetches_the_rest(
    hub, tmp_path
):
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    env |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "*",
    }
    command = [sys.executable, "-m", "streamr1_ref.cli.main", "download", "qwen2-vl"]
    command += ["--folder", str(tmp_path)]

    def run(*more):
        settings = {"env": env, "capture_output": True, "text": True, "timeout": 120}
        return subprocess.run([*command, *more], **settings)

    def sizes():
        files = [p for p in (tmp_path / "qwen2-vl").glob("*.*") if p.is_file()]
        return {p.name: p.stat().st_size for p in files}

    planned = run("--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert "in 2 files, 0.00 GB to fetch" in planned.stdout and sizes() == {}

    broken = run()
    assert broken.returncode == 2 and "Traceback" not in broken.stderr
    assert "streamr1: download: Qwen/Qwen2-VL-2B-Instruct could not be fetched" in broken.stderr
    assert "finished files stay, so run it again" in broken.stderr
    assert sizes() == {"a.safetensors": 3_000}  # b is not there in half

    hub.breaks = False
    hub.seen.clear()
    done = run()
    assert done.returncode == 0, done.stderr
    assert sizes() == {"a.safetensors": 3_000, "b.safetensors": 5_000}
    assert (tmp_path / "qwen2-vl" / "b.safetensors").read_bytes() == FILES["b.safetensors"]
    fetched = [path for method, path in hub.seen if method == "GET"]
    assert not any("a.safetensors" in path or "README" in path for path in fetched)
