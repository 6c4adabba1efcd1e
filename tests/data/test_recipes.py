"""Recipes and downloads: HTTPS alone, plain names, no code of a package, no more bytes than a bound."""

import email.message
import io
import subprocess
import urllib.error
import urllib.request

import pytest

from jaxlm.data import sources
from jaxlm.errors import UserError

RECIPE = (sources.RECIPES / "tinyshakespeare.toml").read_text()
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


@pytest.mark.parametrize("name", sources.names())
def test_the_recipes_that_come_with_jaxlm_are_sound(name):
    assert sources.read_recipe(sources.RECIPES / f"{name}.toml")["name"] == name


@pytest.mark.parametrize(
    ("old", "new"),
    [
        *(("https://", "http://"), (URL, "file:///etc/passwd"), (URL, "ftp://a/b"), (URL, "https://a b"), (URL, "")),
        *(('"input.txt"', '"../input.txt"'), ('"input.txt"', '"/etc/passwd"'), ('"input.txt"', '".hidden"')),
        *(('"input.txt"', "7"), ('"all"', '"test"'), ('"86c4', '"86C4'), ('sha256 = "', 'sha256 = "0')),
        *(("timeout_s = 10\n", "timeout_s = -1\n"), ("timeout_s = 180\n", ""), ("dm-sonnet==1.36", "dm-sonnet")),
        *(("dm-sonnet==1.36", "--index-url=http://a/ x==1"), ("dm-sonnet==1.36", "git+https://a/b"), ('"text"', '"x"')),
        *(('kind = "https"', 'kind = "shell"'), ("[[files]]", "[files]"), (RECIPE, ""), (RECIPE, "a = " + "[" * 9999)),
    ],
)
def test_a_recipe_that_leads_elsewhere_is_refused(tmp_path, old, new):
    assert old in RECIPE
    path = tmp_path / "a.toml"
    path.write_text(RECIPE.replace(old, new, 1))
    with pytest.raises(UserError, match="correct it"):
        sources.read_recipe(path)


def redirect(to):
    handler, request = sources._HttpsOnly(), urllib.request.Request("https://a.invalid/x")
    return handler.redirect_request(request, io.BytesIO(), 302, "Found", email.message.Message(), to)


def test_a_redirect_away_from_https_is_not_followed():
    assert redirect("https://b.invalid/y").full_url == "https://b.invalid/y"
    for to in ("http://b.invalid/y", "ftp://b.invalid/y"):
        with pytest.raises(urllib.error.URLError, match="not HTTPS"):
            redirect(to)
    opener = urllib.request.build_opener(sources._HttpsOnly)
    handlers = [one for one in opener.handlers if isinstance(one, urllib.request.HTTPRedirectHandler)]
    assert [type(one) for one in handlers] == [sources._HttpsOnly]  # it takes the place of the usual one


def test_an_answer_without_end_is_cut_off(monkeypatch):
    class Endless(io.RawIOBase):
        def read(self, size=-1):
            assert 0 < size < 10**6
            return bytes(size)

    monkeypatch.setattr(sources, "LARGEST", 1000)
    monkeypatch.setattr(sources, "_opened", lambda source: Endless())
    with pytest.raises(OSError, match="more than 1,000 bytes"):
        sources._from_https({"url": "https://a.invalid", "timeout_s": 1})


def test_no_source_package_is_fetched(monkeypatch):
    """pip runs the code of a source package to learn its name."""
    asked = []

    def run(command, **options):
        asked.extend(command)
        return subprocess.CompletedProcess(command, 1, "", "no")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(OSError, match="pip download failed: no"):
        sources._from_wheel({"requirement": "a==1", "members": [], "timeout_s": 1})
    assert "--only-binary=:all:" in asked
