"""The flags that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Data = Annotated[Path | None, typer.Option(help="Folder of everything Heed keeps. (HEED_DATA, else heed-data)")]
Port = Annotated[int | None, typer.Option(help="TCP port of chat, feedback and page. (HEED_PORT, else 8000)")]
Host = Annotated[str | None, typer.Option(help="Address to listen on. (HEED_HOST, else 127.0.0.1)")]
Model = Annotated[str | None, typer.Option(help="Base model: directory or hub id. (HEED_MODEL, else the built-in one)")]
Url = Annotated[str | None, typer.Option(help="Address of the server. (this machine, HEED_PORT)")]
ApiKey = Annotated[
    str | None, typer.Option("--key", "--api-key", help="API key, where the server wants one. (HEED_API_KEY)")
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Listen beyond this machine without API keys. (HEED_INSECURE)")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
