"""The page in headless Chromium: what a person does with it, and what an answer must not do to it.

AXE names axe-core's axe.min.js (npm pack axe-core) for the accessibility test; SCREENSHOTS a folder for pictures.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from helpers.serving import Running

from arriero.serve.config import ServeConfig

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium here; on Debian: apt install chromium"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def two(smollm2_gguf):
    """Two models side by side: the same, by two names."""
    config = ServeConfig(model=(f"base={smollm2_gguf}", f"other={smollm2_gguf}"), port=0, cache_gb=0.25)
    with Running(config) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, two):
    context = browser.new_context(viewport={"width": 1200, "height": 850}, accept_downloads=True)
    page = context.new_page()
    page.errors = []
    page.asked = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: page.asked.append(request.url))
    page.set_default_timeout(60_000)
    page.goto(two.url)
    page.get_by_role("status").filter(has_text="Ready").wait_for()
    page.locator("#settings summary").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Longest answer").fill("40")
    page.get_by_label("Longest answer").press("Tab")
    yield page
    assert page.errors == []
    assert [
        url for url in page.asked if not url.startswith((two.url, "data:", "blob:"))
    ] == []  # nothing from elsewhere
    context.close()


def say(page, text):
    page.locator("#message").fill(text)
    page.locator("#message").press("Enter")


def answered(page, text="Answered"):
    page.get_by_role("status").filter(has_text=text).first.wait_for()


def answers(page):
    return page.locator(".answer .text").all_inner_texts()


def test_an_answer_is_streamed_counted_kept_and_made_again(page, two):
    say(page, "Say hello.")
    answered(page)
    [first] = answers(page)
    asked = {
        "model": "base",
        "messages": [{"role": "user", "content": "Say hello."}],
        "temperature": 0,
        "max_tokens": 40,
    }
    content = two.call("/v1/chat/completions", asked)[1]["choices"][0]["message"]["content"]
    assert " ".join(first.split()) == " ".join(content.split())
    assert "tokens/s" in page.locator(".speed").inner_text()
    page.reload()
    page.get_by_role("status").filter(has_text="Ready").wait_for()
    assert answers(page) == [first]
    page.get_by_role("button", name="Answer again").click()
    answered(page)
    assert answers(page) == [first]  # temperature 0
    page.get_by_role("button", name="New conversation").first.click()
    assert answers(page) == []
    page.get_by_role("button", name="Open: Say hello.").click()
    assert answers(page) == [first]


def test_stop_ends_an_answer_and_its_request(page, two):
    page.get_by_label("Longest answer").fill("2000")
    page.get_by_label("System prompt").fill("You count without end.")
    page.get_by_label("System prompt").press("Tab")
    say(page, "Write all numbers from 1 to 1000 in words.")
    page.locator(".answer .text p").first.wait_for()
    page.keyboard.press("Escape")
    answered(page, "Stopped")
    assert "stopped" in page.locator(".speed").inner_text()
    engine = two.server.models._loaded["base"].engine
    page.wait_for_timeout(1000)
    assert not engine.busy


def test_a_message_that_is_edited_is_asked_again(page):
    say(page, "Say hello.")
    answered(page)
    page.get_by_role("button", name="Edit this message").click()
    page.get_by_label("Your message").fill("What is two and two?")
    page.get_by_role("button", name="Keep").click()
    page.locator(".question").filter(has_text="two and two").wait_for()
    answered(page)
    assert page.locator(".question").count() == 1


def test_models_answer_side_by_side_and_ratings_become_rows(page, tmp_path, smollm2_gguf):
    from arriero.data.formats import parse_record
    from arriero.data.preference_formats import parse_preference
    from arriero.io.records import read_records

    page.get_by_label("other").check()
    say(page, "Name an animal of the Andes.")
    answered(page)
    assert len(answers(page)) == 2
    page.get_by_role("button", name="Edit this answer").first.click()
    page.get_by_label("The answer").fill("The llama.")
    page.get_by_role("button", name="Keep").click()
    page.get_by_role("button", name="Bad answer").nth(1).click()
    page.locator("#rows summary").click()
    assert page.locator("#row-count").inner_text() == "2 preferences, 1 good answers"
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder) / "chat.png")
    for name, label in (("preferences", "Preferences"), ("sft", "Good answers")):
        with page.expect_download() as download:
            page.get_by_role("button", name=label).click()
        download.value.save_as(tmp_path / f"{name}.jsonl")
    rows = [parse_preference(record) for record in read_records(tmp_path / "preferences.jsonl")]
    assert len(rows) == 2
    [good] = [parse_record(record) for record in read_records(tmp_path / "sft.jsonl")]
    assert good.messages[-1]["content"] == "The llama."


def test_a_text_is_coloured_by_its_log_probabilities(page, two):
    text = "The capital of France is Paris <b>and</b> it hums."
    page.get_by_label("other").check()
    page.get_by_role("button", name="Probabilities").click()
    page.get_by_label("Text, each token").fill(text)
    page.get_by_role("button", name="Colour").click()
    page.get_by_text("Hover over a token").wait_for()
    columns = page.locator(".tokens").all_inner_texts()
    assert columns == [text, text]
    told = two.call("/v1/completions", {"model": "base", "prompt": text, "max_tokens": 0, "echo": True, "logprobs": 5})
    logprobs = told[1]["choices"][0]["logprobs"]
    i = logprobs["tokens"].index(" Paris")
    title = page.locator(".tokens").first.locator(".token").nth(i).get_attribute("title")
    assert f"ln p {logprobs['token_logprobs'][i]:.2f}" in title
    assert "\n" in title
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder) / "probabilities.png")
    page.locator(".tokens").first.locator(".token").first.focus()
    for _ in range(i):
        page.keyboard.press("ArrowRight")
    assert page.locator("#score-status").text_content() == title


def test_a_conversation_is_shown_with_its_training_mask(page):
    say(page, "Say hello.")
    answered(page)
    page.get_by_role("button", name="Probabilities").click()
    page.get_by_role("button", name="Take the conversation").click()
    page.get_by_text("Hover over a token").wait_for()
    trained = "".join(page.locator(".token.trained").all_inner_texts())
    assert trained.endswith("<|im_end|>")
    assert "Say hello." not in trained
    assert "Say hello." in "".join(page.locator(".token.masked").all_inner_texts())


HOSTILE = [
    "<script>window.hit = 1</script>",
    "<img src=x onerror='window.hit = 2'>",
    "[click](javascript:window.hit=3)",
    "[click](JaVaScRiPt:window.hit=4) [x](data:text/html,<script>window.hit=5</script>)",
    "![x](x\" onerror=\"window.hit=6)",
    "<a href=\"javascript:window.hit=7\">x</a>",
    "```html\n<script>window.hit=8</script>\n```",
    "`<svg onload=window.hit=9>`",
    "| <script>window.hit=10</script> | b |\n|-|-|\n| <iframe srcdoc='<script>top.hit=11</script>'> | c |",
    "**<b onmouseover=window.hit=12>**",
    "[a](http://x\"onmouseover=window.hit=13)",
    "<style>@import 'http://evil.example/x.css';</style>",
    "[" * 3000 + "](x)" * 3000,
    "*" * 5000 + "`" * 5000,
    "> " * 2000 + "deep",
    "\n".join(" " * i + "- x" for i in range(300)),
]  # fmt: skip


def test_hostile_markdown_stays_text(page):
    """Through the page's own renderer, then clicked and hovered."""
    page.evaluate(
        """async (texts) => {
            const { show } = await import("/page/markdown.js");
            for (const text of texts) {
                const box = document.createElement("div");
                box.className = "hostile";
                document.getElementById("log").append(box);
                const began = performance.now();
                show(text, box);
                box.dataset.took = performance.now() - began;
            }
        }""",
        HOSTILE,
    )
    boxes = page.locator(".hostile")
    assert boxes.count() == len(HOSTILE)
    assert boxes.locator("script, img, iframe, svg, style, b, [onerror], [onload], [onmouseover]").count() == 0
    links = boxes.locator("a").evaluate_all("nodes => nodes.map((node) => node.protocol)")
    assert set(links) <= {"http:"}
    assert page.evaluate("window.hit") is None
    assert max(map(float, boxes.evaluate_all("nodes => nodes.map((node) => node.dataset.took)"))) < 2000
    assert "<script>window.hit = 1</script>" in boxes.first.inner_text()


def test_markdown_is_rendered(page):
    text = (
        "# Title\n\nSome **bold**, *soft* and `code`; 2 * 3 * 4, snake_case_name.\n\n1. one\n2. two\n   - deep\n\n"
        "```py\nx < 1\n```\n\n| a | b |\n|-|-|\n| 1 | 2 |\n\n[site](https://example.org)"
    )
    html = page.evaluate(
        """async (text) => {
            const { show } = await import("/page/markdown.js");
            const box = document.createElement("div");
            show(text, box);
            return box.innerHTML;
        }""",
        text,
    )
    assert html == (
        "<h3>Title</h3>"
        "<p>Some <strong>bold</strong>, <em>soft</em> and <code>code</code>; 2 * 3 * 4, snake_case_name.</p>"
        '<ol start="1"><li>one</li><li>two<ul><li>deep</li></ul></li></ol>'
        '<pre tabindex="0"><code>x &lt; 1</code></pre>'
        "<table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>1</td><td>2</td></tr></tbody></table>"
        '<p><a href="https://example.org" rel="noopener noreferrer nofollow" target="_blank">site</a></p>'
    )  # fmt: skip


def test_the_policy_forbids_code_that_is_not_the_pages(page, two):
    _, _, headers = two.call("/")
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "window.hit = 1";
            document.body.append(script);
        }"""
    )
    assert page.evaluate("window.hit") is None
    assert any("Content Security Policy" in error for error in page.errors)
    page.errors.clear()


def test_the_page_is_used_by_keyboard_alone(page):
    page.get_by_role("button", name="New conversation").first.focus()
    page.keyboard.press("Enter")  # the focus is on the message now
    page.keyboard.type("Say hello.")
    page.keyboard.press("Enter")
    answered(page)
    seen = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.getAttribute('aria-label') || document.activeElement.id"))
    assert {"Good answer", "Edit this answer", "Answer again", "view-score", "theme", "send"} <= seen | {"send"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_violations(page, scheme):
    axe = Path(os.environ.get("AXE", "node_modules/axe-core/axe.min.js"))
    if not axe.is_file():
        pytest.skip("axe-core is absent: npm pack axe-core, and AXE=.../axe.min.js")
    page.emulate_media(color_scheme=scheme)
    say(page, "Say hello.")
    answered(page)
    source = axe.read_text()
    for name in ("Chat", "Probabilities"):
        page.get_by_role("button", name=name).click()
        if name == "Probabilities":
            page.get_by_label("Text, each token").fill("A llama hums.")
            page.get_by_role("button", name="Colour").click()
            page.get_by_text("Hover over a token").wait_for()
        found = page.evaluate(f"async () => {{ {source}; return (await axe.run()).violations; }}")
        assert [(v["id"], [n["html"] for n in v["nodes"]]) for v in found] == [], json.dumps(found)[:2000]
