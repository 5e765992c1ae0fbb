"""The pictures of the playground in docs/sampling.md, by Chromium and its driver.

python -m benchmarks.screenshot --workdir=DIR --template=TEXT --output=FILE [--position=N] [--step=N]

Fills the template with the page's own settings, shows the given step, and what else could stand at a token.
"""

import json
import shutil
import subprocess
import sys

from absl import app, flags
from selenium import webdriver
from selenium.webdriver.support.wait import WebDriverWait

flags.DEFINE_string("workdir", None, "Directory of a trained diffusion model.", required=True)
flags.DEFINE_string("template", None, "Text with holes.", required=True)
flags.DEFINE_float("temperature", 0.7, "As on the page.")
flags.DEFINE_integer("seed", 0, "As on the page.")
flags.DEFINE_integer("step", None, "To show; by default the last.")
flags.DEFINE_integer("position", None, "Token whose alternatives to show.")
flags.DEFINE_string("output", None, "PNG file.", required=True)

SET = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))"


def main(_) -> None:
    values = flags.FLAGS
    command = [sys.executable, "-m", "sedd_jax.playground", f"--workdir={values.workdir}", "--port=0"]
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1000,1000"):
        options.add_argument(argument)
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server,
        webdriver.Chrome(options=options, service=service) as browser,
    ):
        find = lambda name: browser.find_element("id", name)  # noqa: E731
        wait = lambda ready: WebDriverWait(browser, 300).until(lambda _: ready())  # noqa: E731
        browser.get(json.loads(server.stdout.readline())["url"])
        for name in ("template", "temperature", "seed"):
            browser.execute_script(SET, find(name), getattr(values, name))
        find("fill").click()
        wait(lambda: "network calls" in find("status").text)
        if values.position is not None:
            find("text").find_elements("tag name", "span")[values.position].click()
            wait(lambda: find("alternatives").find_elements("tag name", "tr"))
        if values.step is not None:
            browser.execute_script(SET, find("scrub"), values.step)
        height = browser.execute_script("return document.documentElement.scrollHeight")
        browser.set_window_size(1000, height + 150)
        browser.save_screenshot(values.output)
        server.terminate()


if __name__ == "__main__":
    app.run(main)
