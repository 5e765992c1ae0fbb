"""The playground: a real server, asked over HTTP and by a real browser."""

import concurrent.futures
import http.client
import json
import shlex
import shutil

import pytest
from running import run, start


@pytest.fixture(scope="module")
def port(models):
    process = start("playground", f"--workdir={models / 'diffusion'}", "--port=0", real=True)
    yield int(json.loads(process.stdout.readline())["url"].strip("/").rpartition(":")[2])
    process.terminate()
    assert "Traceback" not in process.communicate(timeout=60)[1]


def ask(port, path, request, **headers):
    """(status, the answer's lines) of a request, which is bytes or becomes JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    body = request if isinstance(request, bytes) else json.dumps(request).encode()
    connection.request("POST", path, body, {"Content-Type": "application/json"} | headers)
    response = connection.getresponse()
    return response.status, [json.loads(line) for line in response.read().splitlines() if response.status == 200]


def fill(port, template="the [[6]].", **settings):
    return ask(port, "/fill", {"template": template, "seed": 3, "steps": 4} | settings)[1]


def test_the_command_of_the_page_gives_its_text(port):
    answer = fill(port)
    frames, last = [part for part in answer if "spans" in part], answer[-1]
    assert [frame["number"] for frame in frames] == list(range(frames[-1]["of"] + 1))
    text = "".join(text for text, _ in frames[-1]["spans"])
    assert text.startswith("the ") and len(frames[-1]["spans"]) == 11
    command = shlex.split(last["command"])
    assert command[:3] == ["python", "-m", "sedd_jax.sample"]
    out, _ = run("sample", *command[3:])
    assert out.splitlines()[1] == text and json.loads(out.splitlines()[-1])["network_evaluations"] == last["calls"]


def test_alternatives_are_a_distribution_given_all_others(port):
    tokens = fill(port)[-1]["tokens"]
    changed = tokens[:5] + [tokens[5] + 1] + tokens[6:]
    found = [ask(port, "/alternatives", {"tokens": row, "position": 5})[1][-1] for row in (tokens, changed)]
    assert found[0] == found[1]  # what stands there itself does not matter
    probs = [probability for _, probability in found[0]["alternatives"]]
    assert probs == sorted(probs, reverse=True) and 0 < sum(probs) <= 1 + 1e-6


def test_visitors_wait_for_one_another(port):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda seed: fill(port, seed=seed), range(3)))
    assert max(part.get("ahead", 0) for answer in answers for part in answer) >= 1
    assert [answer[-1]["tokens"] for answer in answers] == [fill(port, seed=seed)[-1]["tokens"] for seed in range(3)]


@pytest.mark.parametrize(
    ("request_", "line"),
    [
        ({"template": "the [[x]]", "seed": 0}, "malformed hole"),
        ({"template": "[[99]]", "seed": 0}, "more than the model's length"),
        ({"template": 5, "seed": 0}, "give a text"),
        ({"template": "[[2]]", "seed": -1}, "a seed"),
        ({"template": "[[2]]", "seed": 0, "steps": "many"}, "give an integer"),
        ({"template": "[[2]]", "seed": 0, "steps": 0}, "at least 1"),
        ({"template": "[[2]]", "seed": 0, "method": "none"}, "choose one of"),
        ({"template": "[[2]]", "seed": 0, "temperature": float("nan")}, "temperature=nan must be"),
        (b"{", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[]", "no JSON object"),
        (b" " * (1 << 19), "too long"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value)[:40],
)
def test_bad_input_is_a_sentence(port, request_, line):
    status, answer = ask(port, "/fill", request_)
    assert status == 200 and line in answer[-1]["error"]


def test_other_tokens_than_a_windows_are_refused(port):
    others = ([1] * 31, 0), ([1] * 32, 32), ([1] * 32, -1), ([999] * 32, 0), ("text", 0), ([1.5] * 32, 0)
    for tokens, position in others:
        assert "error" in ask(port, "/alternatives", {"tokens": tokens, "position": position})[1][-1]


def test_other_sites_are_refused(port):
    request = {"template": "[[2]]", "seed": 0}
    assert ask(port, "/fill", request, Host="evil.example")[0] == 404
    assert ask(port, "/fill", request, **{"Content-Type": "text/plain"})[0] == 404
    assert ask(port, "/other", request)[0] == 404


def test_a_causal_model_is_refused(models):
    _, errors = run("playground", f"--workdir={models / 'ar'}", expect=2)
    assert "from left to right" in errors


def test_in_a_browser(port, models):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    support = pytest.importorskip("selenium.webdriver.support.wait")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no chromium with its driver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1100,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    with webdriver.Chrome(options=options, service=service) as browser:
        patience = support.WebDriverWait(browser, 120)
        find = lambda name: browser.find_element("id", name)  # noqa: E731
        status = lambda word: patience.until(lambda _: word in find("status").text)  # noqa: E731
        browser.get(f"http://127.0.0.1:{port}/")
        assert str(models / "diffusion") in find("model").text
        set_value = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))"
        browser.execute_script(set_value, find("template"), "the [[6]] <b>.")
        browser.execute_script(set_value, find("steps"), "2")
        assert find("steps-shown").text == "4"
        find("fill").click()
        status("network calls")
        assert find("text").text.startswith("the ") and find("text").text.endswith("<b>.")
        assert "--steps=4" in find("command").text and find("step").text == "step 5 of 5"
        browser.execute_script(set_value, find("scrub"), "0")
        assert find("step").text == "step 0 of 5" and "\u2591" in find("text").text
        find("text").find_elements("tag name", "span")[5].click()
        patience.until(lambda _: find("alternatives").find_elements("tag name", "tr"))
        browser.execute_script(set_value, find("template"), "[[oops")
        find("fill").click()
        status("malformed hole")
        assert find("status").get_attribute("class") == "error"
        assert browser.get_log("browser") == []
