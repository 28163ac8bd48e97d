"""The replaced system's way: Flask's threaded server, the last keepalive of each client in a dictionary."""

import logging
import sys
from datetime import UTC, datetime
from typing import Any

from flask import Flask, jsonify, request

app = Flask(__name__)
clients: dict[str, dict[str, Any]] = {}


@app.post("/api/v1/keepalive")
def keepalive() -> Any:
    said = request.get_json()
    if request.headers.get("X-API-Key") != "bench-key-0123456789":
        return jsonify(error="key"), 401
    now = datetime.now(UTC).isoformat()
    clients[said["client_id"]] = {"last_seen": now, "ip": said.get("public_ip"), **said.get("location", {})}
    return jsonify(status="ok", message="Keepalive received", server_time=now)


if __name__ == "__main__":
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    # HTTP/1.1, or every request would pay for a connection that the others keep.
    from werkzeug.serving import WSGIRequestHandler

    WSGIRequestHandler.protocol_version = "HTTP/1.1"
    app.run("127.0.0.1", int(sys.argv[1]), threaded=True)
