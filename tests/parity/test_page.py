"""`jaxlm.parity.page`: what the report's files say, that nothing in them is markup by accident or from outside."""

import html.parser
import json
import re
import shutil
import subprocess

import pytest

from jaxlm.errors import UserError
from jaxlm.parity.measure import Row
from jaxlm.parity.page import check_new_report, page, write_report
from jaxlm.parity.report import Divergence, Report

EVIL = '<script>alert("1")</script> & <img src="http://example.com/x.png">'
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
LOADING = {"script", "link", "img", "iframe", "object", "embed", "video", "audio", "source", "base", "form", "use"}


def row(quantity, name, verdict="same", float64_rel=3e-15):
    return Row(quantity, name, (2, 3), 1e-6, 1e-6, 8.0, 1e-7, 2e-7, float64_rel, verdict)


ROWS = (
    row("activation", "block_0/attention"),
    row("activation", "block_0/mlp", float64_rel=0.0),
    row("activation", EVIL, "DIFFERS", float("inf")),
    row("logits", "", float64_rel=2e-15),
    row("gradient", "embedding", float64_rel=None),
)
REPORT = Report(ROWS, Divergence("activation", EVIL, True, EVIL, (EVIL,)))
FACTS = {"reference": EVIL, "files_sha256": {"a.bin": "00ff", EVIL: "11"}, "git_commit": None, "config": {}}


class Elements(html.parser.HTMLParser):
    """The elements of a page, whether each is closed, and its text."""

    def __init__(self, text):
        super().__init__()
        self.names, self.attributes, self.open, self.text = [], [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_needs_nothing_from_outside_and_escapes_what_it_is_told():
    text = page(EVIL, FACTS, REPORT)
    found = Elements(text)
    assert found.open == []
    assert not LOADING & set(found.names)
    assert not [name for name, _ in found.attributes if name in ("src", "href", "srcset", "data") or name[:2] == "on"]
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text
    assert found.text.count(EVIL) >= 6  # as text, not as markup


def test_the_page_shows_every_row_and_a_dot_for_every_error():
    text = page("a model", FACTS, REPORT)
    found = Elements(text)
    assert "The two differ." in found.text
    assert "first divergence, activation" in found.text
    assert found.names.count("tr") == (1 + 3) + (1 + len(ROWS))  # the worst of each quantity, and all
    dots = re.findall(r'cy="([\d.]+)" r="[\d.]+" fill="#009e73"><title>(.*?):', text)
    heights = {name: float(y) for y, name in dots}
    assert len(heights) == 3
    infinite = next(height for name, height in heights.items() if name.startswith("&lt;"))
    assert infinite < heights["block_0/attention"] < heights["block_0/mlp"]  # larger errors are higher
    assert "both in float64, inf" in text
    assert "The two are the same up to rounding." in page("a model", FACTS, Report(ROWS[:2]))
    assert "Error of the gradient" not in page("a model", FACTS, Report(ROWS[:2]))


def test_both_files_are_written_and_an_old_report_is_not_overwritten(tmp_path):
    folder = tmp_path / "a" / "b"
    check_new_report(folder)
    write_report(folder, "a model", FACTS, REPORT)
    found = json.loads((folder / "report.json").read_text())
    assert (found["passed"], found["reference"], found["git_commit"]) == (False, EVIL, None)
    assert [one["name"] for one in found["rows"]] == [one.name for one in ROWS]
    assert found["rows"][2]["float64_rel"] == "inf"
    assert (folder / "index.html").read_text() == page("a model", FACTS, REPORT)
    with pytest.raises(UserError, match="has report.json and index.html already: choose another folder"):
        check_new_report(folder)
    with pytest.raises(UserError, match="is not a folder"):
        check_new_report(folder / "report.json")
    with pytest.raises(UserError, match="cannot be created"):
        write_report(folder / "report.json" / "x", "a model", FACTS, REPORT)


@pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is installed")
def test_chromium_shows_the_page(tmp_path):
    write_report(tmp_path, EVIL, FACTS, REPORT)
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    shown = subprocess.run(
        [BROWSER, *options, "--dump-dom", f"file://{tmp_path / 'index.html'}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    found = Elements(shown)
    assert not LOADING & set(found.names)
    assert found.names.count("tr") == 4 + 1 + len(ROWS)
    assert found.names.count("circle") == 2 * 3 + 3 * 3 + 2  # two legends, and the errors that there are
    assert EVIL in found.text
