"""The page in a real browser: by keyboard alone, on a phone, and without anything from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.serve.completions import ServerSettings
from tests.serve.chromium import BROWSER, Tab, chromium
from tests.serve.conftest import serving
from tests.serve.test_serve import get

ANSWERED = "Number(document.documentElement.dataset.answered || 0) === {}"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    if BROWSER is None:
        pytest.skip("there is no Chromium")
    with chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


def test_the_page_works_by_keyboard_alone(tab: Tab, address: str) -> None:
    tab.open(address, 1200, 900)
    tab.tab_to("sample")
    tab.press("Enter")
    tab.wait("document.getElementById('name').textContent.includes('448')")
    tab.tab_to("question")
    tab.run("document.getElementById('question').select()")
    tab.type("What is it?")
    tab.tab_to("ratio")
    tab.press("ArrowLeft", 4)
    assert tab.run("document.getElementById('ratio-shown').textContent") == "30%"
    tab.tab_to("compare")
    tab.press(" ")
    tab.tab_to("ratio2")
    assert not tab.run("document.getElementById('key').offsetParent")  # there is no key to give
    tab.tab_to("ask")
    tab.press("Enter")
    tab.wait(ANSWERED.format(1))
    assert tab.run("document.getElementById('error').textContent") == ""
    panes = tab.run("[...document.querySelectorAll('.pane')].map(pane => pane.innerText)")
    assert len(panes) == 2 and panes[0].startswith("30% kept, ivc-prune") and panes[1].startswith("100% kept")
    assert "58 of 192 kept" in panes[0] and "192 of 192 kept" in panes[1] and "KV cache" in panes[0]
    labels = tab.run("[...document.querySelectorAll('canvas')].map(canvas => canvas.getAttribute('aria-label'))")
    assert "134 pruned" in labels[0] and all(
        tab.run("[...document.querySelectorAll('canvas')].map(c => c.width > 400)")
    )
    assert tab.run("[...document.querySelectorAll('.answer')].every(answer => answer.textContent.length)")
    assert not tab.faults


def test_the_page_fits_a_phone(tab: Tab, address: str) -> None:
    tab.open(address, 360, 740, phone=True)
    tab.run("document.getElementById('sample').click()")
    tab.wait("document.getElementById('name').textContent.includes('448')")
    tab.run("document.getElementById('ask').click()")
    tab.wait(ANSWERED.format(1))
    assert tab.run("document.documentElement.scrollWidth") <= 360
    buttons = "[...document.querySelectorAll('button')].filter(button => !button.hidden)"
    small = f"{buttons}.filter(button => button.getBoundingClientRect().height < 44).length"
    assert tab.run(small) == 0
    assert not tab.faults


def test_the_page_stops_an_answer_and_tells_mistakes(
    tab: Tab, tiny_session: OnnxSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tiny_session, ServerSettings("tiny", keys=("secret",), most_tokens=100_000)) as address:
        tab.open(address, 800, 800)
        tab.run("document.getElementById('ask').click()")
        tab.wait(ANSWERED.format(1))
        assert "the API key is missing" in tab.run("document.getElementById('error').textContent")
        tab.faults.clear()  # the browser tells of the 401
        tab.run("document.getElementById('key').value = 'secret'; document.getElementById('tokens').value = 4000")
        tab.run("document.getElementById('ask').click()")
        tab.wait("(document.querySelector('.answer') || {textContent: ''}).textContent.length > 5")
        tab.press("Escape")
        tab.wait(ANSWERED.format(2))
        assert tab.run("document.getElementById('error').textContent") == "stopped"
    assert not tab.faults


def test_the_page_names_nothing_from_elsewhere(address: str) -> None:
    status, page = get(address, "/")
    assert status == 200 and "http" not in page.replace("http-equiv", "") and "/*FACTS*/" not in page
    assert page.count("<script>") == 1 and " src=" not in page and "@import" not in page
