"""The playground as a person uses it: headless Chromium in front of a real endpoint of the tiny run."""

import base64
import contextlib
import hashlib
import json
import re
import shutil

import httpx
import pytest
from endpoints import serving, write_keys
from playwright.sync_api import expect, sync_playwright
from tiny_run import COUNTING, EXPERTS, STORIES, make_run

from gradientspace_ray.serving.playground import HEADERS, PAGE

pytestmark = [pytest.mark.ray, pytest.mark.slow]
API_KEY = "sk-playground"
COUNT, STORY = EXPERTS
HTML = '<img src=x onerror="window.hacked = true"><script>window.hacked = true</script> & <b>bold</b>'
LONG_MS = 20_000
expect.set_options(timeout=LONG_MS)
# What the browser itself says of a response with an error status, or of none, that a test has provoked.
PROVOKED = "Failed to load resource"


@pytest.fixture(scope="module")
def url(ray_cluster, tmp_path_factory, tiny_model_dir, tiny_encoder_dir):
    """A real endpoint that asks for a key."""
    folder = tmp_path_factory.mktemp("playground")
    run = make_run(folder / "run", tiny_model_dir, tiny_encoder_dir)
    keys = write_keys(folder / "keys.yaml", keys=[{"name": "page", "key": API_KEY}])
    with serving(run, keys_file=keys) as url:
        yield url


@pytest.fixture(scope="session")
def chromium():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    return found or pytest.skip("no Chromium on this machine; install it, as with: apt-get install chromium")


@pytest.fixture(scope="module")
def browser(chromium, url):
    """Started after the endpoint and closed before it: beside Playwright's event loop, Serve cannot be managed."""
    with sync_playwright() as playwright:
        # In a container the tests often are root, for whom Chromium has no sandbox.
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def tab(browser, url, **settings):
    """The page in a tab of its own, which stays within its origin and complains of nothing."""
    with contextlib.closing(browser.new_context(viewport={"width": 1200, "height": 850}, **settings)) as context:
        page = context.new_page()
        page.set_default_timeout(LONG_MS)
        requested, complaints = [], []
        page.on("request", lambda request: requested.append(request.url))
        page.on("console", lambda message: complaints.append(message.text) if message.type != "log" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        yield page
        assert [at for at in requested if not at.startswith((f"{url}/", "data:"))] == []
        assert [text for text in complaints if not text.startswith(PROVOKED)] == []
        assert page.evaluate("window.hacked") is None


@pytest.fixture
def page(browser, url):
    """The playground with a key, greedy answers and few tokens."""
    with tab(browser, url) as page:
        page.add_init_script(f"sessionStorage.setItem('gradientspace-api-key', {API_KEY!r})")
        page.goto(url)
        expect(page.locator("#experts button")).to_have_count(len(EXPERTS))
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Most tokens").fill("24")
        page.get_by_role("button", name="Settings").click()
        yield page


def ask(page, prompt):
    page.get_by_label("Your prompt").fill(prompt)
    page.get_by_label("Your prompt").press("Enter")


def answer_of(page, place=-1):
    """The finished answer at a place; waits for it."""
    answer = page.locator(".answer").nth(place)
    expect(answer).to_have_attribute("aria-busy", "false", timeout=LONG_MS)
    return answer


def text_of(answer):
    return answer.locator(".text").text_content()


def options_of(page, label="Answered by"):
    groups = page.get_by_label(label).locator("optgroup:not([hidden])")
    return {group.get_attribute("label"): group.locator("option").all_text_contents() for group in groups.all()}


@contextlib.contextmanager
def asked(page, number=1):
    """The bodies of the chat requests that the page sends within the block."""
    bodies = []

    def keep(request):
        if request.url.endswith("/v1/chat/completions"):
            bodies.append(request.post_data_json)

    page.on("request", keep)
    yield bodies
    page.remove_listener("request", keep)
    assert len(bodies) == number


def api_answer(url, model, messages):
    """What the API says to the fixture's settings, and the headers that tell the route."""
    body = {"model": model, "messages": messages, "max_tokens": 24, "temperature": 0}
    headers = {"authorization": f"Bearer {API_KEY}"}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60).raise_for_status()
    return answer.json()["choices"][0]["message"]["content"], answer.headers


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def chunk(text=None, **fields):
    delta = {} if text is None else {"content": text}
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": None}], **fields}


def script_answers(page, *events, done=True):
    """Answers to chat requests that no model can be made to give; every byte comes in a network chunk of its own."""
    stream = "".join(f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events)
    body = list(f"{stream}data: [DONE]\n\n".encode() if done else stream.encode())
    page.evaluate(
        """bytes => {
          window.realFetch ??= window.fetch;
          window.fetch = (path, options) => {
            if (!path.endsWith("chat/completions")) return window.realFetch(path, options);
            const left = [...bytes];
            return Promise.resolve(new Response(new ReadableStream({
              pull(stream) { left.length ? stream.enqueue(Uint8Array.of(left.shift())) : stream.close(); },
            })));
          };
        }""",
        body,
    )


def test_the_headers_let_in_the_page_s_own_script_and_style_and_nothing_else():
    page = PAGE.decode()
    policy = dict(directive.split(" ", 1) for directive in HEADERS["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    for tag in ("script", "style"):
        inside = page.split(f"<{tag}>")[1].split(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert not re.search(r"""\b(src|href|action)=["'](?!data:)|@import|url\(|\bon[a-z]+="|style=|innerHTML""", page)


def test_the_page_is_served_to_all_with_its_headers(url):
    answer = httpx.get(f"{url}/")
    assert (answer.status_code, answer.content) == (200, PAGE)
    assert HEADERS.items() <= dict(answer.headers).items()


def test_a_chat_streams_and_shows_its_route(page, url):
    page.evaluate(
        """() => {
          window.lengths = [];
          const look = () => lengths.push(document.querySelector(".text")?.textContent.length ?? 0);
          new MutationObserver(look).observe(document.getElementById("conversation"), {subtree: true, childList: true});
        }"""
    )
    ask(page, COUNTING[0])
    answer = answer_of(page)
    text, headers = api_answer(url, "auto", [user(COUNTING[0])])
    assert text_of(answer) == text
    assert len({length for length in page.evaluate("lengths") if 0 < length < len(text)}) > 1, "it came at once"
    confidence = round(100 * float(headers["x-gradientspace-confidence"]))
    expect(answer.locator(".line")).to_contain_text(f"{COUNT}chosen by the router, {confidence} % sure")
    rows = answer.locator(".bar").all_inner_texts()
    assert [row.split()[0] for row in rows] == [COUNT, STORY]
    shares = [int(re.search(r"(\d+) %", row)[1]) for row in rows]
    assert shares[0] == confidence
    assert abs(sum(shares) - 100) <= 1
    widths = answer.locator(".track span").evaluate_all("bars => bars.map(bar => bar.getBoundingClientRect().width)")
    assert widths[0] / sum(widths) == pytest.approx(shares[0] / 100, abs=0.02)
    facts = answer.locator("footer").inner_text()
    assert re.search(r"router \d+ ms · first token [\d.]+ m?s · 24 tokens · [\d.]+ tokens/s · cut at the limit", facts)
    expect(page.get_by_role("status")).to_have_text(f"{COUNT} has answered.")


def test_a_conversation_goes_on_with_the_settings(page):
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.3")
    page.get_by_label("Most tokens").fill("5")
    ask(page, STORIES[0])
    first = text_of(answer_of(page))
    with asked(page) as bodies:
        prompt = page.get_by_label("Your prompt")
        prompt.press_sequentially("and")
        prompt.press("Shift+Enter")
        prompt.press_sequentially("then")
        prompt.dispatch_event("keydown", {"key": "Enter", "isComposing": True})  # it ends a character's composition
        expect(prompt).to_have_value("and\nthen")
        page.get_by_role("button", name="Send").click()
        answer_of(page)
    expect(page.locator(".prompt").last).to_have_text("and\nthen", use_inner_text=True)
    system = {"role": "system", "content": "Be brief."}
    assert bodies[0] == {
        "model": "auto",
        "messages": [system, user(STORIES[0]), assistant(first), user("and\nthen")],
        "temperature": 0.3,
        "max_tokens": 5,
        "stream": True,
        "stream_options": {"include_usage": True},
        "gradientspace": {"explain": True},
    }
    page.get_by_role("button", name="New chat").click()
    with asked(page) as bodies:
        ask(page, COUNTING[1])
        answer_of(page)
    assert bodies[0]["messages"] == [system, user(COUNTING[1])]


@pytest.mark.parametrize("model", ["base", "generalist", STORY])
def test_a_model_can_be_forced(page, url, model):
    page.get_by_label("Answered by").select_option(model)
    ask(page, COUNTING[0])
    answer = answer_of(page)
    expect(answer.locator(".line")).to_contain_text(f"{model}chosen by you")
    assert text_of(answer) == api_answer(url, model, [user(COUNTING[0])])[0]


def test_the_models_are_listed_and_the_versions_that_have_no_name(page, url):
    titles = {name: f"{name}: {name.replace('-', ' ')}" for name in EXPERTS}
    listed = {
        "Routed": ["auto: the router picks"],
        "Experts": list(titles.values()),
        "Without an expert": ["generalist: trained on everything", "base: no adapter"],
    }
    assert options_of(page) == options_of(page, "Compared with") == listed
    models = httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {API_KEY}"}).json()["data"]
    before = f"{COUNT}@0123456789ab"
    other = {"id": before, "object": "model", "root": before, "metadata": {"title": "as it was", "examples": 3}}
    models = [*(model for model in models if model["id"].split("@")[0] != COUNT), other]
    page.get_by_role("button", name="Compare").click()
    page.get_by_label("Answered by").select_option(COUNT)
    page.get_by_label("Compared with").select_option(STORY)
    page.route("**/v1/models", lambda route: route.fulfill(json={"object": "list", "data": models}))
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("#experts button")).to_have_text([re.compile(f"^{STORY}.*[1-9] examples$")])
    versions = {"Experts": [titles[STORY]], "Versions of other releases": [f"{before}: as it was"]}
    assert options_of(page) == listed | versions
    expect(page.get_by_label("Answered by")).to_have_value("auto")
    expect(page.get_by_label("Compared with")).to_have_value(STORY)


def test_an_expert_s_card_chooses_it(page):
    page.locator("#experts").get_by_role("button", name=STORY).click()
    page.keyboard.type(COUNTING[0])
    page.keyboard.press("Enter")
    expect(answer_of(page).locator(".line")).to_contain_text(f"{STORY}chosen by you")


def test_two_models_answer_side_by_side_each_in_its_own_conversation(page, url):
    page.get_by_role("button", name="Compare").click()
    page.get_by_label("Answered by").select_option(COUNT)
    page.get_by_label("Compared with").select_option("base")
    with asked(page, 2) as bodies:
        ask(page, STORIES[0])
        left, right = answer_of(page, 0), answer_of(page, 1)
    assert [body["model"] for body in bodies] == [COUNT, "base"]
    boxes = [left.bounding_box(), right.bounding_box()]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] < boxes[1]["x"]
    texts = [text_of(left), text_of(right)]
    assert texts == [api_answer(url, model, [user(STORIES[0])])[0] for model in (COUNT, "base")]
    assert texts[0] != texts[1]
    with asked(page, 2) as bodies:
        ask(page, "go on")
        answer_of(page, 2), answer_of(page, 3)
    assert [body["messages"] for body in bodies] == [[user(STORIES[0]), assistant(t), user("go on")] for t in texts]


def test_both_answers_stream_at_once(page):
    page.get_by_role("button", name="Compare").click()
    page.get_by_label("Answered by").select_option(COUNT)
    page.get_by_label("Compared with").select_option(STORY)
    page.get_by_label("Most tokens").evaluate("field => { field.value = 400; }")
    page.evaluate(
        """() => new MutationObserver(() => {
          window.together ||= document.querySelectorAll("[aria-busy=true] .text > :not(:empty)").length === 2;
        }).observe(document.getElementById("conversation"), {subtree: true, childList: true})"""
    )
    ask(page, STORIES[1])
    answer_of(page, 0), answer_of(page, 1)
    assert page.evaluate("together"), "one waited for the other"


def test_another_expert_answers_beside_the_one_that_was_chosen(page, url):
    ask(page, COUNTING[0])
    answer_of(page).get_by_role("button", name=f"Let {STORY} answer, too").click()
    expect(page.locator(".answer")).to_have_count(2)
    beside = answer_of(page, 1)
    expect(beside.locator(".line")).to_contain_text(f"{STORY}chosen by you")
    assert text_of(beside) == api_answer(url, STORY, [user(COUNTING[0])])[0]
    expect(page.get_by_label("Compared with")).to_have_value(STORY)


@pytest.mark.parametrize("how", ["button", "Escape", "New chat"])
def test_a_stop_ends_the_stream(page, how):
    tokens = page.get_by_label("Most tokens")
    tokens.evaluate("field => { field.value = 480; }")
    ask(page, STORIES[1])
    expect(page.locator(".text")).not_to_be_empty()
    with page.expect_event("requestfailed") as failed:
        if how == "Escape":
            page.keyboard.press("Escape")
        else:
            page.get_by_role("button", name="Stop" if how == "button" else how).click()
    assert failed.value.failure == "net::ERR_ABORTED"
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    if how == "New chat":
        expect(page.locator(".answer")).to_have_count(0)
        return
    answer = answer_of(page)
    expect(answer.locator("footer")).to_contain_text("stopped after")
    text = text_of(answer)
    tokens.evaluate("field => { field.value = 4; }")
    with asked(page) as bodies:
        ask(page, COUNTING[0])
        answer_of(page, 1)
    assert text_of(page.locator(".answer").first) == text
    assert bodies[0]["messages"] == [user(STORIES[1]), assistant(text), user(COUNTING[0])]


def test_html_stays_text_wherever_it_comes_from(page):
    page.get_by_label("Answered by").evaluate("(select, name) => select.add(new Option(name, name))", HTML)
    page.get_by_label("Answered by").select_option(HTML)
    ask(page, HTML)
    answer = answer_of(page)
    expect(page.locator(".prompt")).to_have_text(HTML)
    expect(answer.get_by_role("alert")).to_contain_text(f"the model {HTML!r} does not exist")
    route = {"expert": HTML, "model": HTML, "confidence": 0.9, "reason": HTML, "probabilities": {HTML: 0.9, "b": 0.1}}
    script_answers(page, chunk(gradientspace=route), chunk(f"{HTML}\n```{HTML}\n{HTML}\n```\n{HTML}"))
    answer.get_by_role("button", name="Try again").click()
    answer = answer_of(page)
    expect(answer.locator(".line b")).to_have_text(HTML)
    expect(answer.locator(".text pre")).to_have_text(HTML)
    assert text_of(answer) == f"{HTML}\n{HTML}{HTML}"
    assert page.locator("#conversation :is(img, script, .text b, .prompt b)").count() == 0


def test_text_arrives_whole_in_any_chunks(page):
    script_answers(page, *map(chunk, ["a\nb\n\n  ", "日本語 🗝️é", "\n```py", "thon\nif a < b:\n    pass\n``", "`\nend"]))
    ask(page, "hello")
    answer = answer_of(page)
    assert answer.locator(".text").inner_text().splitlines()[:4] == ["a", "b", "", "  日本語 🗝️é"]
    assert answer.locator(".text pre").text_content() == "if a < b:\n    pass"
    assert text_of(answer).endswith("passend")


@pytest.mark.parametrize(
    ("reason", "expert", "probabilities", "words"),
    [
        ("routed", "b", {"a": 0.004, "b": 0.996}, "bchosen by the router, >99 % sure"),
        ("routed", "a", {"a": 0.3, "b": 0.7}, "akept from the conversation so far"),
        ("low_confidence", "generalist", {"a": 0.4, "b": 0.6}, "answers because the router was not sure (b: 60 %)"),
        ("out_of_distribution", "generalist", {"a": 0.5, "b": 0.5}, "the prompt is unlike the training data"),
    ],
)
def test_the_route_is_told_in_plain_words(page, reason, expert, probabilities, words):
    route = {"expert": expert, "reason": reason, "probabilities": probabilities}
    route["confidence"] = max(probabilities.values())
    script_answers(page, chunk(gradientspace=route), chunk("text"))
    ask(page, "hello")
    expect(answer_of(page).locator(".line")).to_contain_text(words)


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([chunk("half"), {"error": {"message": "the server failed"}}], "the server failed"),
        ([chunk("half")], "The connection ended before the answer was complete."),
    ],
)
def test_a_stream_that_breaks_says_so_and_can_be_tried_again(page, events, message):
    script_answers(page, *events, done=False)
    ask(page, COUNTING[0])
    answer = answer_of(page)
    expect(answer.get_by_role("alert")).to_have_text(message)
    assert text_of(answer) == "half"
    page.evaluate("window.fetch = window.realFetch")
    answer.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(answer_of(page).locator(".line")).to_contain_text(COUNT)
    expect(page.locator(".answer")).to_have_count(1)


def test_an_endpoint_that_is_away_or_busy_says_so(page):
    page.context.set_offline(True)
    ask(page, COUNTING[0])
    expect(answer_of(page).get_by_role("alert")).to_contain_text("cannot be reached")
    page.context.set_offline(False)
    busy = {"error": {"message": "too many requests wait", "type": "rate_limit_error", "param": None, "code": None}}
    page.route("**/chat/completions", lambda route: route.fulfill(status=429, json=busy, headers={"retry-after": "3"}))
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("alert")).to_have_text("too many requests wait (try again in 3 s)")
    page.unroute("**/chat/completions")
    page.route("**/chat/completions", lambda route: route.fulfill(status=502, body="<html>Bad gateway</html>"))
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("alert")).to_have_text("The endpoint answered with status 502.")


def test_a_key_is_asked_for_only_when_the_endpoint_does(browser, url):
    with tab(browser, url) as page:
        page.goto(url)
        dialog = page.get_by_role("dialog")
        dialog.get_by_role("button", name="Cancel").click()
        expect(page.get_by_role("alert")).to_have_text("This endpoint needs an API key.")
        page.get_by_role("button", name="Try again").click()
        dialog.get_by_label("API key").fill("sk-wrong")
        dialog.get_by_label("API key").press("Enter")
        expect(dialog).to_contain_text("does not accept this key")
        dialog.get_by_label("API key").fill(API_KEY)
        dialog.get_by_role("button", name="Continue").click()
        expect(page.locator("#experts button")).to_have_count(len(EXPERTS))
        expect(dialog).to_be_hidden()
        ask(page, COUNTING[0])
        expect(answer_of(page).locator(".line")).to_contain_text(COUNT)
        page.reload()
        expect(page.locator("#experts button")).to_have_count(len(EXPERTS))
        assert page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]


def test_a_narrow_window_needs_no_scrolling_sideways(page):
    page.set_viewport_size({"width": 375, "height": 700})
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Compare").click()
    wide = "w" * 300
    route = {"expert": wide, "confidence": 0.9, "reason": "routed", "probabilities": {wide: 0.9, f"{wide}2": 0.1}}
    script_answers(page, chunk(gradientspace=route), chunk(f"{wide}\n```\n{wide}\n```\n"))
    for _ in range(2):
        assert page.evaluate("document.scrollingElement.scrollWidth") == 375
        ask(page, wide)
        answer_of(page, 0), answer_of(page)
    for control in ("Send", "New chat", "Compare", "Settings"):
        expect(page.get_by_role("button", name=control)).to_be_in_viewport(ratio=1)


def test_every_control_has_a_name_and_the_keyboard_reaches_it(page):
    ask(page, COUNTING[0])
    answer_of(page)
    page.get_by_role("button", name="Settings").click()
    named = """controls => controls.filter(control => control.checkVisibility()).map(control =>
      control.getAttribute("aria-label") || [...(control.labels ?? [])].map(label => label.innerText).join("")
      || control.innerText)"""
    names = page.locator("button, select, input, textarea, summary").evaluate_all(named)
    assert all(names)
    page.locator("h1").click()
    reached = set()
    for _ in names:
        page.keyboard.press("Tab")
        reached.add(page.evaluate(f"({named})([document.activeElement])[0]"))
    assert reached == set(names)


def test_the_policy_holds_in_the_browser(browser, url):
    """What an injection would try: the browser refuses it."""
    script = "Object.assign(document.createElement('script'), {text: 'window.hacked = true'})"
    attempts = {
        "markup": "document.body.innerHTML = '<b>x</b>'",
        "a script": f"document.body.append({script})",
        "another origin": "await fetch('http://127.0.0.1:9/')",
    }
    with contextlib.closing(browser.new_context()) as context:
        page = context.new_page()
        page.goto(url)
        for name, attempt in attempts.items():
            refused = page.evaluate(f"async () => {{ try {{ {attempt}; return false; }} catch {{ return true; }} }}")
            assert refused, name
        assert page.evaluate("window.hacked") is None
