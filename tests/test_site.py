"""The documents as a site: no link leads nowhere, nothing comes from elsewhere, and a formula leads to its function."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, as `make docs` builds it."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(out)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


def test_pages_load_nothing_from_elsewhere(site: Path):
    pages = [*site.rglob("*.html")]
    assert len(pages) > 30
    for page in pages:
        loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"?([^\"> ]+)", page.read_text("utf-8"))
        assert not [one for one in loaded if re.match(r"(?:\w+:)?//", one)], page


def test_a_formula_leads_to_the_line_where_its_function_begins(site: Path):
    page = (site / "how-it-learns.html").read_text("utf-8")
    led = re.findall(r'href="([^"#]+\.py\.html)#(__codelineno-0-\d+)"><code>[^<:]+::([\w.]+)</code>', page)
    assert len(led) > 30
    for target, anchor, name in led:
        listing = (site / target).read_text("utf-8")
        line = listing.partition(f'<a id="{anchor}"')[2].partition("\n")[0]
        assert re.search(rf"\b{name.rpartition('.')[2]}\b", re.sub(r"<[^>]+>", "", line)), name
