"""report.html in Chromium, as a reader meets it. Skipped where there is no Chromium with its driver."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace

import pytest
from run_folders import METHODS, answer, grid, manifest, measurements, write_run

from cli.main import main

webdriver = pytest.importorskip("selenium.webdriver")
wait = pytest.importorskip("selenium.webdriver.support.wait").WebDriverWait
CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1400,1000"
).split()
NASTY = "</script><script>document.title='x'</script><img src=x onerror=\"document.title='x'\">\x1b[31m\x1b]0;t\x07"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield made
    made.quit()


@pytest.fixture
def opened(browser, tmp_path):
    """Report some folders and open the page; whatever the browser says against it fails the test."""

    def open_page(*runs, file="report.html", command="report"):
        assert main([command, *map(str, runs), "--out", str(tmp_path / "out")]) == 0
        for log in ("browser", "performance"):
            browser.get_log(log)
        browser.get((tmp_path / "out" / file).as_uri())
        assert browser.execute_script("return document.documentElement.dataset.ready") == "true"
        return browser

    yield open_page
    said = [entry["message"] for entry in browser.get_log("browser")]
    asked = [entry["message"] for entry in browser.get_log("performance") if 'requestWillBeSent"' in entry["message"]]
    assert said == []
    assert [line for line in asked if '"url":"http' in line] == []


def rows_of(browser):
    """The cells of the sample browser that can be seen."""
    rows = browser.find_elements("css selector", "#samples tbody tr")
    return [[cell.text for cell in row.find_elements("css selector", "td")] for row in rows]


def counted(browser):
    return browser.find_element("css selector", ".dt-info").text


def choose(browser, name, label):
    from selenium.webdriver.support.select import Select

    Select(browser.find_element("name", name)).select_by_visible_text(label)


def test_a_page_of_all_kinds_of_runs_opens_without_a_complaint(opened, tmp_path):
    runs = [
        write_run(tmp_path / "niah", grid()),
        write_run(tmp_path / "bench", measurements(), manifest("throughput", config={"machine": "here"})),
    ]
    page = opened(*runs)
    shown = page.execute_script("return [...document.images].map(image => image.naturalWidth > 0 && image.complete)")
    assert len(shown) == 6
    assert all(shown)
    assert counted(page) == "1–24 of 24 answers"


def test_filters_leave_what_they_say(opened, tmp_path):
    page = opened(write_run(tmp_path / "run", grid()))
    choose(page, "method", METHODS[1])
    assert counted(page) == "1–8 of 8 answers (of 24)"
    assert {cells[3] for cells in rows_of(page)} == {METHODS[1]}
    choose(page, "length", "1,024")
    assert counted(page) == "1–4 of 4 answers (of 24)"
    choose(page, "verdict", "wrong")
    assert [(cells[2], cells[4], cells[5]) for cells in rows_of(page)] == [
        ("depth=0,round=0", "0.00", "2 of 2"),
        ("depth=2,round=0", "0.00", "2 of 2"),
    ]
    choose(page, "verdict", "right")
    assert {(cells[4], cells[5]) for cells in rows_of(page)} == {("1.00", "never")}
    choose(page, "verdict", "changed: worse than full attention")
    assert counted(page) == "1–2 of 2 answers (of 24)"
    choose(page, "verdict", "changed: better than full attention")
    assert "no such answers" in rows_of(page)[0][0]
    page.find_element("css selector", "button[type=reset]").click()
    time.sleep(0.1)
    assert counted(page) == "1–24 of 24 answers"
    page.find_element("name", "text").send_keys("1003")
    time.sleep(0.5)
    assert counted(page) == "1–6 of 6 answers (of 24)"


def test_an_answer_opens_with_prompt_references_and_first_difference(opened, tmp_path):
    page = opened(write_run(tmp_path / "run", grid()))
    choose(page, "method", METHODS[1])
    page.find_element("css selector", "button.open").click()
    said = page.find_element("css selector", "td.answer").text
    assert "token 2 of 2: token id 9, where full attention has token id 6" in said
    assert "what is the number of text 0?" in said
    assert said.count("1000.") == 2  # its own answer and full attention's
    page.find_element("css selector", "button.open").click()
    assert page.find_elements("css selector", "td.answer") == []


def test_scripts_and_terminal_escapes_in_answers_are_shown_as_text(opened, tmp_path):
    records = [replace(r, prediction=NASTY, references=[NASTY], prompt_tail=NASTY, sample=f"{NASTY}{n}", task=NASTY)
               for n, r in enumerate(grid())]  # fmt: skip
    page = opened(write_run(tmp_path / "run", records, manifest(notes=[NASTY])))
    shown = NASTY.replace("\x1b", "␛").replace("\x07", "␇")
    page.find_element("css selector", "button.open").click()
    texts = [element.text for element in page.find_elements("css selector", "td.answer pre")]
    assert texts == [shown] * 3
    page.find_element("name", "text").send_keys("</script>")  # searching reads every text once more
    time.sleep(0.5)
    for head in page.find_elements("css selector", "#samples th"):
        head.click()
    assert counted(page) == "1–24 of 24 answers"
    assert page.title == "niah · m · float32 on cpu"
    assert page.find_elements("css selector", "#samples img, .note img") == []


def test_light_dark_and_paper_differ_as_they_should(opened, tmp_path):
    page = opened(write_run(tmp_path / "run", grid()))

    def seen(media, theme):
        features = [{"name": "prefers-color-scheme", "value": theme}]
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
        time.sleep(0.3)  # a picture chooses its source a moment later
        return page.execute_script(
            "const image = document.images[0];"
            "return [getComputedStyle(document.body).backgroundColor, image.currentSrc === image.src,"
            " getComputedStyle(document.getElementById('answers')).display]"
        )

    white, black = "rgb(255, 255, 255)", "rgb(22, 22, 22)"
    try:
        assert seen("screen", "light") == [white, True, "block"]
        assert seen("screen", "dark") == [black, False, "block"]
        assert seen("print", "dark") == [white, True, "none"]
    finally:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})


def test_fifty_thousand_answers_open_within_two_seconds(opened, tmp_path):
    records = (
        answer(method, n, 1.0 if n % 3 else 0.0, prediction=f" {n} " + "some more words of an answer " * 8,
               prompt_tail="the end of a prompt " * 12 + str(n), tokens=[5, n], prompt_sha256=str(n),
               meta={"depth": n % 10})
        for n in range(50_000 // len(METHODS) + 1) for method in METHODS
    )  # fmt: skip
    run = write_run(tmp_path / "run", records)
    page = opened(run)
    assert counted(page).endswith(" of 50,001 answers")
    times = []
    for _ in range(3):  # the fastest: other work on this machine is not the page's doing
        page.refresh()
        times.append(page.execute_script("return performance.getEntriesByType('navigation')[0].loadEventEnd") / 1000)
    assert 0 < min(times) <= 2, times
    began = time.perf_counter()
    choose(page, "verdict", "wrong")
    assert counted(page) == "1–25 of 16,668 answers (of 50,001)"
    assert time.perf_counter() - began < 2


def test_a_leaderboard_sorts_by_its_columns(opened, tmp_path):
    run = write_run(tmp_path / "run", grid(lengths=[1024]))
    page = opened(run, file="leaderboard.html", command="leaderboard")

    def column(place):
        return [cell.text for cell in page.find_elements("css selector", f"tbody td:nth-child({place})")]

    assert column(2) == ["full", "quest", "shadowkv"]
    assert column(4) == ["100.0", "50.0", "50.0"]
    for order in (["50.0", "50.0", "100.0"], ["100.0", "50.0", "50.0"]):
        page.find_element("xpath", "//th[contains(., 'score')]").click()
        wait(page, 10).until(lambda _, order=order: column(4) == order)  # it is drawn a moment later
