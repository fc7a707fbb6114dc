"""storage.hub against a hub of our own on this machine, spoken to by the real huggingface_hub client."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from lora_scale.spec.config import ModelConfig
from lora_scale.spec.errors import ModelError
from lora_scale.storage import hub

COMMIT = hashlib.sha1(b"main").hexdigest()
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"weights",
    "tokenizer.model": b"pieces",
    "chat_template.jinja": b"{{ messages }}",
    "merges.txt": b"a b",
    "modeling_my.py": b"code",
    "pytorch_model.bin": b"a pickle",
    "consolidated.safetensors": b"a second copy",
    "onnx/model.json": b"{}",
    "README.md": b"",
}
ERRORS = {  # repository -> status and code as the hub sends them
    "org/gated": (403, "GatedRepo"),
    "org/none": (404, "RepoNotFound"),
    "org/private": (401, "RepoNotFound"),
    "org/broken": (500, ""),
}


class Hub(BaseHTTPRequestHandler):
    """The four requests that a download makes."""

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.paths.append(self.path)  # type: ignore[attr-defined]
        path = self.path.partition("?")[0].lstrip("/").removeprefix("api/models/")
        repository = "/".join(path.split("/")[:2])
        if repository in ERRORS:
            status, code = ERRORS[repository]
            self._send(status, b"", **({"X-Error-Code": code} if code else {}))
        elif "revision/v9" in path:
            self._send(404, b"", **{"X-Error-Code": "RevisionNotFound"})
        elif "/resolve/" in path:
            content = FILES[path.split("/", 4)[4]]
            self._send(200, content, ETag=hashlib.sha1(content).hexdigest(), **{"X-Repo-Commit": COMMIT})
        elif "/tree/" in path:
            self._send_json([self._entry(name, content) for name, content in FILES.items()])
        else:
            self._send_json({"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]})

    def _entry(self, name: str, content: bytes) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode())

    def _send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Starts the hub; the paths that were asked for."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.paths = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # an earlier test in this process may have trained
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server.paths  # type: ignore[attr-defined]
    server.shutdown()
    thread.join()
    server.server_close()


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


NEEDED = {"config.json", "model.safetensors", "tokenizer.model", "chat_template.jinja", "merges.txt"}


def test_a_name_is_downloaded_without_what_is_not_needed(requests: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hub.resolve(ModelConfig(path="org/model"))
    assert names(folder) == NEEDED
    assert folder.name == COMMIT
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert not any("pytorch_model.bin" in path for path in requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.resolve(ModelConfig(path="org/model")) == folder  # now from the cache


def test_code_is_downloaded_only_when_trusted(requests: list[str]) -> None:
    assert names(hub.resolve(ModelConfig(path="org/model", trust_remote_code=True))) == NEEDED | {"modeling_my.py"}


def test_a_folder_never_touches_the_network(
    requests: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one whose name could be a repository's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "org" / "model").mkdir(parents=True)
    for path in (str(tmp_path), "org/model", "./org/model", "~/org/model", "org"):
        assert hub.resolve(ModelConfig(path=path)).is_dir()
    for path in ("/none", "./none", "~/none", "a/b/c", "../none"):
        with pytest.raises(ModelError) as caught:
            hub.resolve(ModelConfig(path=path))
        assert str(caught.value) == f"model.path is {path}, which does not exist"
    assert requests == []


WRONG = {
    "org/gated": "and gated on the hub; ask for access on its page, then `hf auth login`",
    "org/none": "and the hub has no such model, or only a private one (`hf auth login`)",
    "org/private": "and the hub has no such model, or only a private one (`hf auth login`)",
    "org/model@v9": "and the hub has no revision v9 of it; see model.revision",
    "no name": "and no name that the hub allows",
}


@pytest.mark.parametrize("name", WRONG)
def test_what_the_hub_refuses(requests: list[str], name: str) -> None:
    path, _, revision = name.partition("@")
    with pytest.raises(ModelError) as caught:
        hub.resolve(ModelConfig(path=path, revision=revision or None))
    assert str(caught.value) == f"model.path is {path}, which is no folder here, {WRONG[name]}"


def test_a_broken_hub(requests: list[str]) -> None:
    with pytest.raises(ModelError, match=r"^model.path is org/broken, which is no folder here; the hub [^\n]*$"):
        hub.resolve(ModelConfig(path="org/broken"))


def test_offline_and_unreachable(requests: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    end = "and its cache does not hold it: download it first"
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(ModelError) as caught:
        hub.resolve(ModelConfig(path="org/model", revision="v1"))
    where = "model.path is org/model, which is no folder here"
    assert str(caught.value) == f"{where} at revision v1; the hub is unreachable {end}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError) as caught:
        hub.resolve(ModelConfig(path="org/model"))
    assert str(caught.value) == f"{where}; the hub is offline (HF_HUB_OFFLINE) {end}"
