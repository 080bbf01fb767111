"""Upload of an export to a server with the endpoints of the Hub."""

import base64
import json
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest

from pipeline.checkpoint.export_record import ExportRecord
from pipeline.checkpoint.hub import push_to_hub
from pipeline.common.errors import UserError

HUB_URL = "https://huggingface.co/me/model"


class Hub(BaseHTTPRequestHandler):
    """The endpoints of the Hub that an upload of small files uses."""

    commits: ClassVar[list[list[dict]]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        reply: dict[str, Any] = {"url": HUB_URL, "commitUrl": f"{HUB_URL}/commit/1"}
        reply |= {"commitOid": "1" * 40, "success": True}
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            reply = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        elif "/commit/" in self.path:
            self.commits.append([json.loads(line) for line in body.splitlines()])
        content = json.dumps(reply).encode()
        self.send_response(403 if "refused" in body.decode() else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Print nothing."""


def test_push_to_hub_uploads_or_reports_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = ExportRecord("run", 7, "id", "fp32", "..", newest=True)
    (tmp_path / "README.md").write_text("card")
    with pytest.raises(UserError, match=r"me/model: cannot push to the Hub: .*; the export is kept in "):
        push_to_hub(tmp_path, "me/model", None, record)  # HF_HUB_OFFLINE is set
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever).start()
        api = partial(huggingface_hub.HfApi, endpoint=f"http://127.0.0.1:{server.server_port}", token="hf_x")
        monkeypatch.setattr("pipeline.checkpoint.hub.HfApi", api)
        huggingface_hub.close_session()  # the session of before is offline
        try:
            assert push_to_hub(tmp_path, "me/model", None, record).endswith("/me/model")
            with pytest.raises(UserError, match="me/refused: cannot push to the Hub"):
                push_to_hub(tmp_path, "me/refused", None, record)
        finally:
            server.shutdown()
            huggingface_hub.close_session()
    header, file = Hub.commits[0]
    assert header["value"]["summary"] == "Step 7"
    assert (file["value"]["path"], base64.b64decode(file["value"]["content"])) == ("README.md", b"card")
