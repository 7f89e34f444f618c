"""The web page's files over HTTP: what is sent, under which policy, and that nothing comes from elsewhere."""

import re

import httpx

from core.model import Model
from service.web_page import FOLDER
from tests.service.conftest import Serve

SOURCES = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir() if path.is_file()}
ADDRESS = re.compile(r"""(?:src|href)="([^"#]+)"|from "([^"]+)"|url\(([^)]+)\)""")


def test_the_page_and_all_it_names_are_served(client: httpx.Client) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    named = {
        name for source in SOURCES.values() for match in ADDRESS.finditer(source) for name in match.groups() if name
    }
    files = {name.removeprefix("./").removeprefix("page/") for name in named}
    assert files == set(SOURCES) - {"index.html"}  # nothing from elsewhere, nothing left over
    for name in files:
        response = client.get(f"/page/{name}")
        assert response.text == SOURCES[name]
        kind = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}[name.rsplit(".", 1)[1]]
        assert response.headers["content-type"].startswith(kind)
    assert client.head("/").status_code == 200
    for path in ("/page/", "/page/index.html", "/page/../web_page.py", "/page/%2e%2e/web_page.py", "/page/nothing.js"):
        assert client.get(path).status_code == 404


def test_the_policy_forbids_all_that_the_page_does_not_need(client: httpx.Client) -> None:
    policy = client.get("/").headers["content-security-policy"].split("; ")
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "require-trusted-types-for 'script'" in policy
    assert not [rule for rule in policy if "unsafe" in rule or "*" in rule or "http" in rule]
    assert client.get("/").headers["x-content-type-options"] == "nosniff"
    for name, source in SOURCES.items():
        assert len(source.splitlines()) <= 250, name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|cookie", source), name
        assert "localStorage" not in source or name == "price.js"  # the one thing that is kept
        assert not re.search(r"<script(?![^>]* src=)|<style|\son\w+=|\sstyle=", source), name


def test_state_tells_the_form_what_may_be_asked(client: httpx.Client, model: Model) -> None:
    state = client.get("/page/state").json()
    assert state["checkpoint"] == model.name
    assert (state["trained"], state["readout"], state["rates"]) == (False, "memory", [16, 8])
    assert (state["max_new_tokens"], state["key_needed"]) == (512, False)
    assert client.post("/answer", json={**state["example"], "max_new_tokens": 1}).status_code == 200


def test_the_page_comes_without_a_key_and_says_that_one_is_needed(serve: Serve) -> None:
    key = "alpha-0123456789abcdef"
    with serve(api_keys=key) as client:
        assert client.get("/").status_code == 200
        assert client.get("/page/page.js").status_code == 200
        state = client.get("/page/state")
        assert state.json()["key_needed"] is True
        assert key not in state.text
        assert client.post("/answer", json={"query": "q", "passages": ["p"]}).status_code == 401
