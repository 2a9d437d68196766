"""watch.py and nanomaml/follow.py: what a page is sent, what is refused, and the page in a real browser."""
import http.client
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TOY, refuses

import watch
from nanomaml import follow, phases

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def line(step, **metrics):
    axes = {"step": step, "tokens": 10 * step, "flops": 1e3 * step, "seconds": 0.5 * step}
    return json.dumps(axes | metrics) + "\n"


def write_run(folder, steps=range(10), **settings):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"max_steps": 100} | settings))
    probe = {f"entropy/{layer:02}/{head:02}": 0.1 * layer + 0.01 * head
             for layer in (0, 1) for head in (0, 1, 2)}
    (folder / "log.jsonl").write_text("".join(line(i, **{"val/loss": 9 - 0.1 * i, "lr": 0.1}) for i in steps))
    (folder / "probes.jsonl").write_text("".join(
        line(i, **probe, **{"rank/resid/00": i, "new/probe/01": 2}) for i in steps))
    return folder


def append(folder, text, name="log.jsonl"):
    with open(folder / name, "a") as file:
        file.write(text)


# ---- what a page is sent ----


def test_only_what_is_new_is_read_and_sent_and_a_torn_line_waits(tmp_path):
    run = follow.Followed(write_run(tmp_path / "a"), 0)
    assert run.update(1)
    curves = run.since(0)["curves"]
    items = [(i, 10 * i, 1e3 * i, 0.5 * i, 9 - 0.1 * i) for i in range(10)]
    assert curves["val/loss"] == {"renew": True, "items": items} and "seconds" not in curves
    assert {"rank/resid/00", "entropy/00", "entropy/01", "new/probe/01"} <= curves.keys()
    assert curves["entropy/01"]["items"][0][-1] == pytest.approx(0.11)
    assert run.since(0)["frames"]["items"][-1] == {"step": 9, "z": [[0.0, 0.01, 0.02], [0.1, 0.11, 0.12]]}
    read_to = dict(run.read_to)
    append(tmp_path / "a", line(10, **{"val/loss": 7.5}) + '{"step": 11, "val')
    run.update(2)
    assert run.since(1)["curves"] == {"val/loss": {"renew": False, "items": [(10, 100, 1e4, 5.0, 7.5)]}}
    append(tmp_path / "a", '/loss": 7.25}\nnot JSON\n')
    run.update(3)
    assert run.since(2)["curves"]["val/loss"]["items"] == [(11, None, None, None, 7.25)]
    assert run.since(3)["curves"] == {}
    assert all(run.read_to[path][1] >= place for path, (_, place) in read_to.items())
    status = run.status()
    assert (status["step"], status["max_steps"], status["left"]) == (11, 100, pytest.approx(0.5 * 89))
    kind, layer, found = next(row for row in run.phases() if row[0] == "effective rank, residual stream")
    assert layer == "00" and found == phases.phase(range(10), range(10))


@pytest.mark.parametrize("replace", [True, False])
def test_a_log_that_was_replaced_or_cut_is_shown_right(tmp_path, replace):
    """A resume drops the lines after its checkpoint: the page would have shown them twice."""
    folder = write_run(tmp_path / "a")
    run = follow.Followed(folder, 0)
    run.update(1)
    kept = "".join((folder / "log.jsonl").read_text().splitlines(True)[:5])
    if replace:
        (folder / "new").write_text(kept + line(5, **{"val/loss": 1.0}) + " " * 10_000 + "\n")  # and longer
        (folder / "new").rename(folder / "log.jsonl")
    else:
        (folder / "log.jsonl").write_text(kept)
    while not run.update(2):
        pass
    sent = run.since(1)
    assert sent["renew"] and sent["curves"]["val/loss"]["renew"]
    assert [item[0] for item in sent["curves"]["val/loss"]["items"]] == list(range(6 if replace else 5))


def test_a_curve_keeps_its_extremes_in_a_bounded_number_of_points():
    """A page that is left open does not grow."""
    rng, sizes, series = np.random.default_rng(0), [], follow.Series(follow.extremes)
    values = rng.standard_normal(50_000)
    values[[1234, 40_321]] = 99, -99
    for step, value in enumerate(values):
        series.add((step, value), step + 1)
        sizes.append(len(series.items))
    points = [item for _, item in series.items]
    assert max(sizes) == follow.MOST and points[-1] == (49_999, values[-1])
    assert {(1234, 99), (40_321, -99)} <= set(points) and points == sorted(points)
    assert series.since(49_000)["renew"] == (series.renewed > 49_000)
    assert len(series.since(len(values) - 1)["items"]) == 1


def test_runs_that_begin_later_and_250_of_them(tmp_path):
    for number in range(250):
        write_run(tmp_path / f"{number:03}", range(3))
    watched = watch.Watched([str(tmp_path)])
    assert len(watched.data({})["runs"]) == 250 and watched.data({})["new"] == []
    write_run(tmp_path / "later" / "run")
    watched.update()
    [new] = watched.data({250: 0})["new"]
    assert watched.data({})["runs"][250]["name"].endswith("later/run")
    assert len(new["curves"]["val/loss"]["items"]) == 10


def test_a_link_out_of_the_runs_is_not_followed(tmp_path):
    folder = write_run(tmp_path / "a")
    shutil.move(folder / "probes.jsonl", tmp_path / "secret.jsonl")
    (folder / "probes.jsonl").symlink_to(tmp_path / "secret.jsonl")
    run = follow.Followed(folder, 0)
    run.update(1)
    assert run.since(0)["curves"].keys() == {"val/loss", "lr"}


def test_one_odd_folder_does_not_keep_the_others_from_the_page(tmp_path):
    """Each ended the thread that reads, or every answer: in silence."""
    good = write_run(tmp_path / "good")
    watched = watch.Watched([str(tmp_path)])
    write_run(tmp_path / "a", max_steps="x")
    append(tmp_path / "a", '{"step": 10, "lr": 1, "seconds": "x", "adapt/ways": "4", "val/loss": 1.0}\n')
    append(tmp_path / "a", '{"step": 11, "entropy/00/00": 1e308, "entropy/00/01": 1e308}\n')
    (tmp_path / "b" / "log.jsonl").mkdir(parents=True)
    (tmp_path / "c").mkdir()
    long = "x" * (follow.CHUNK + 9) + "\n"
    (tmp_path / "c" / "log.jsonl").write_text(long + line(3, **{"val/loss": 2.0}))
    (tmp_path / "d").mkdir()
    os.mkfifo(tmp_path / "d" / "log.jsonl")
    append(good, line(10, **{"val/loss": 1.5}))
    for _ in range(5):
        watched.update()
    data = json.loads(json.dumps(watched.data(dict.fromkeys(range(9), 0)), allow_nan=False))
    found = {run["name"].rpartition("/")[2]: run for run in data["runs"]}
    assert found["good"]["step"] == 10 and found["a"]["max_steps"] is None and found["c"]["step"] == 3
    (good / "run.json").symlink_to(tmp_path / "c" / "log.jsonl")
    assert watched.data({})["runs"][0]["facts"] == {}
    assert data["session"] != watch.Watched([str(good)]).session


# ---- what is refused ----


@pytest.fixture
def served(tmp_path):
    """(server, ask): ask(path, method, host) -> (status, headers, body)."""
    write_run(tmp_path / "runs" / "a")
    server = watch.serve(watch.Watched([str(tmp_path / "runs")]), 8000)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def ask(path, method="GET", host=None):
        connection = http.client.HTTPConnection(*server.server_address, timeout=20)
        connection.request(method, path, headers={"Host": host} if host else {})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()

    yield server, ask
    server.shutdown()
    server.server_close()


def test_what_the_server_answers_and_refuses(served):
    server, ask = served
    assert server.server_address[0] == "127.0.0.1"
    status, headers, text = ask("/")
    policy = headers["Content-Security-Policy"]
    assert status == 200 and "default-src 'none'" in policy and b"POLICY" not in text
    assert policy.count("unsafe") == 1 and "style-src 'unsafe-inline'" in policy
    assert ask("/plotly.min.js")[2].startswith(b"/**") and ask("/", host="localhost:1")[0] == 200
    data = json.loads(ask("/data?have=0:0,7:1,x:y")[2])
    assert data["runs"][0]["step"] == 9 and len(data["new"]) == 1
    assert json.loads(ask("/phases?run=0")[2])[0][1:] and json.loads(ask("/phases?run=9")[2]) == []
    for path, method, host, code in (
            ("/", "GET", "evil.example", 403), ("/", "GET", "evil.example:8000", 403),
            ("/../../etc/passwd", "GET", None, 404), ("/log.jsonl", "GET", None, 404),
            ("/%2e%2e/config.json", "GET", None, 404), ("/phases?run=x", "GET", None, 404),
            ("/", "POST", None, 501), ("/data", "DELETE", None, 501)):
        assert ask(path, method, host)[0] == code, path


def test_mistakes_are_one_line_and_a_port_in_use_the_next_one(tmp_path, served, capsys):
    server, _ = served
    other = watch.serve(server.RequestHandlerClass.watched, server.server_address[1])
    assert other.server_address[1] > server.server_address[1]
    other.server_close()
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    for given, says in (([], "name the folders of runs"), ([str(tmp_path / "empty")], "no run there"),
                        ([str(tmp_path / "notes.txt")], "no run there"), (["no"], "no run there"),
                        ([str(tmp_path / "runs"), "--port=70000"], "no port from 70000 to")):
        refuses(lambda given=given: watch.main(given), says)


# ---- in a browser ----


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install -r requirements-dev.txt")
    if CHROMIUM is None:
        pytest.skip("no chromium is installed")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def open_page(browser, url, width=1280):
    """A page whose errors, and requests to other hosts, are collected in page.wrong."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.wrong = []
    own = ("http://127.0.0.1", "file://", "data:", "blob:")
    page.on("console", lambda said: said.type in ("error", "warning") and page.wrong.append(said.text))
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("request", lambda request: request.url.startswith(own) or page.wrong.append(request.url))
    page.goto(url)
    return page


def until(page, condition):
    """Waits for a condition in JavaScript. (Playwright's own way needs eval, which the page forbids.)"""
    for _ in range(600):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"{condition} does not come: {page.wrong}")


POINTS = ("[...document.querySelectorAll('#main .panel')]"
          ".find(div => div.data && div.dataset.key === 'validation loss')"
          "?.data.map(trace => trace.x.length) ?? []")


def test_the_page_of_a_run_that_is_training(browser, toy, tmp_path):
    """Curves grow, the slider moves the heads, a run can be hidden, and nothing is asked of another host."""
    name = "<img src=x onerror=alert(1)>"
    write_run(tmp_path / "runs" / "done", range(60))
    flags = [f"--data={toy}", f"--out_dir={tmp_path}/runs/{name}", "--max_steps=100000", "--eval_every=1",
             "--probe_every=2", "--checkpoint_every=0", "--report=False"]
    command = [sys.executable, "train.py", *TOY, *flags]
    training = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        server = watch.serve(watch.Watched([str(tmp_path / "runs")]), 8300)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = open_page(browser, f"http://127.0.0.1:{server.server_address[1]}/")
        until(page, f"({POINTS}).length === 2 && Math.min(...({POINTS})) > 3")
        before = page.evaluate(POINTS)
        until(page, f"({POINTS}).reduce((a, b) => a + b) > {sum(before) + 3}")
        names = [f"{tmp_path}/runs/{folder}" for folder in ("done", name)]
        assert page.locator("#runs b").all_text_contents() == names
        assert "step 59 of 100" in page.locator(".run small").first.text_content()
        titles = page.evaluate("[...document.querySelectorAll('#main .panel')].map(d => d.dataset.key)")
        assert titles[0] == "validation loss" and {"new/probe", "attention entropy"} <= set(titles)
        page.locator("#slider").scroll_into_view_if_needed()
        until(page, "document.querySelectorAll('#heat .js-plotly-plot').length === 2")
        page.locator("#slider").fill("0")
        assert page.locator("#when").text_content() == "step 0"
        until(page, "document.querySelector('#heat .panel').layout.title.text.includes('step 0')")
        page.locator("#play").click()
        until(page, "document.getElementById('when').textContent !== 'step 0'")
        page.locator("#runs input").first.uncheck()
        page.evaluate("scrollTo(0, 0)")
        until(page, f"({POINTS}).length === 1")
        page.locator("#phases summary").click()
        page.wait_for_selector("#tables td", state="attached", timeout=20_000)
        assert page.wrong == []
        server.shutdown()
    finally:
        training.kill()
        training.wait()


@pytest.mark.parametrize("width", [1280, 390])
def test_the_saved_page_opens_from_disk(browser, tmp_path, capsys, width):
    write_run(tmp_path / "<!--<script>x<b>", range(40))
    watch.main([str(tmp_path), f"--save={tmp_path}/page.html"])
    assert "1 run; any" in capsys.readouterr().out
    page = open_page(browser, Path(tmp_path / "page.html").as_uri(), width)
    until(page, f"({POINTS})[0] === 40")
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing to scroll sideways"
    page.locator("#phases summary").click()
    page.wait_for_selector("#tables td", state="attached", timeout=20_000)
    assert page.wrong == []
