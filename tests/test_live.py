"""The live page's server: what it answers, whom it answers, and what it never reads."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import socket
import sys
import threading
import urllib.request

import pytest
import torch
from PIL import Image

import headoff
from headoff.cli import main
from headoff.cli.live import _origin
from headoff.live.commands import Origin, Recipe
from headoff.live.session import Session, Setting

pytest.importorskip("starlette", reason="the live page needs Starlette: pip install 'headoff[live]'")
pytest.importorskip("uvicorn", reason="the live page needs uvicorn: pip install 'headoff[live]'")
pytest.importorskip("httpx", reason="Starlette's test client needs httpx")
from starlette.testclient import TestClient  # noqa: E402

from headoff.live import server, session  # noqa: E402

BASE = "http://127.0.0.1:8517"
OWN = {"Origin": BASE}


@pytest.fixture(scope="module")
def detector():
    return headoff.load("scenes")


@pytest.fixture
def live(detector):
    return Session(detector, [headoff.sample_image(0), headoff.sample_image(1)])


@pytest.fixture
def client(live):
    return TestClient(server.application(live), base_url=BASE, headers=OWN)


def wish(**changes):
    return {"image": "0", "off": "none", "object": None, "ablation": "zero", **changes}


def png(width=40, height=30, colour="red"):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, "PNG")
    return buffer.getvalue()


def outcomes(answer):
    return [(found["status"], pytest.approx(found["now"], abs=1e-4)) for found in answer["objects"]]


@pytest.mark.parametrize(
    ("off", "object", "ablation"),
    [
        ("none", None, "zero"),
        ("H2+4,L5H0=0.5", None, "mean"),
        ("decoder_self L0-3; L5H1", None, "uniform"),
        ("encoder_self L2H0-5", None, "zero"),
        ("only L5H2 on", 1, "zero"),
    ],
)
def test_boxes_are_those_of_a_sweep_and_its_command_and_program_give_the_same(
    client, detector, off, object, ablation, tmp_path, monkeypatch, capsys
):
    answer = client.post("/boxes", json=wish(off=off, object=object, ablation=ablation)).json()
    text = off if object is None else f"object {object}: {off}"
    expected = headoff.sweep(detector, headoff.sample_image(0), text, ablation=ablation)
    (outcome,) = expected.outcomes
    found = [(one.status.value, one.query_score) for one in outcome.outcomes]
    assert found == outcomes(answer)
    assert len(answer["marks"]) >= len(expected.detections[0])
    assert (answer["duplicates"], answer["unmatched"]) == (outcome.duplicates, len(outcome.unmatched))
    gates = headoff.stack([headoff.parse_configuration(off)], detector.head_layout)
    for site, rows in answer["gates"].items():
        gate = gates.site(site)
        torch.testing.assert_close(torch.tensor(rows), torch.ones(6, 8) if gate is None else gate[0, :, 0])

    monkeypatch.setattr(headoff, "load", lambda source: {"scenes": detector}[source])
    names: dict = {}
    exec(answer["program"], names)
    assert [(one.status.value, one.query_score) for one in names["outcome"].outcomes] == outcomes(answer)
    if object is not None:  # the command is run once: it loads the weights again
        words = shlex.split(answer["command"])
        assert words[0] == "headoff"
        assert main([*words[1:], "--out", str(tmp_path), "--figures", "none"]) == 0
        last = json.loads((tmp_path / "sweep.json").read_text())["configurations"][-1]
        assert [one["status"] for one in last["outcomes"]] == [one.status.value for one in outcome.outcomes]


def test_an_image_is_encoded_once(client, detector, monkeypatch):
    calls = []
    encode = type(detector).encode_features
    monkeypatch.setattr(
        type(detector), "encode_features", lambda *args: (calls.append(args[2:]), encode(*args))[1]
    )
    for head in range(3):
        assert client.post("/boxes", json=wish(off=f"H{head}")).status_code == 200
    assert calls == [()]


def test_maps_are_those_of_explain_on_the_scale_of_none_off(client, detector):
    answer = client.post("/maps", json=wish(off="H0-3", map=1)).json()
    explanation = headoff.explain(detector, headoff.sample_image(0), ["none", "H0-3"])
    assert answer["masses"] == pytest.approx(explanation.masses[1, 1].tolist(), rel=1e-3)
    assert answer["shares"] == pytest.approx(explanation.box_shares[1, 1].tolist(), rel=1e-3)
    assert answer["greatest"] == pytest.approx([float(explanation.maps[0, 1].max())] * 6, rel=1e-3)
    assert len(answer["maps"]) == 6 and all(
        one.startswith("data:image/png;base64,") for one in answer["maps"]
    )
    # The scale stays: it is not that of what is shown.
    again = client.post("/maps", json=wish(off="all", map=1)).json()
    assert again["greatest"] == answer["greatest"] and again["masses"] == [0] * 6


def test_maps_of_a_head_are_its_attention_after_the_gate(client, detector):
    answer = client.post("/maps", json=wish(off="L2H3,L4H3=0.5", map=1, head=3)).json()
    weights = headoff.explain(detector, headoff.sample_image(0), ["none"], method="raw", heads=True).heads
    greatest = weights[0, 1, :, 3].amax((-2, -1)).tolist()
    assert answer["greatest"] == pytest.approx(greatest, rel=1e-3)
    assert answer["masses"] == pytest.approx([1, 1, 0, 1, 0.5, 1], abs=1e-3)
    assert answer["shares"][2] is None and 0 < answer["shares"][4] < 1
    # The scale stays that of none off.
    again = client.post("/maps", json=wish(off="all", map=1, head=3)).json()
    assert again["greatest"] == answer["greatest"] and again["masses"] == [0] * 6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"off": "L9H0"}, "names layer 9"),
        ({"off": "frist 3"}, "did you mean 'first'"),
        ({"off": "query 3: H0"}, "choose the object"),
        ({"off": "encoder_self H0", "object": 0}, "encoder_self has no object queries"),
        ({"off": "H0", "object": 99}, "object 99 does not exist"),
        ({"image": "77"}, "not here any more"),
        ({"ablation": "zap"}, "no ablation kind 'zap'"),
        ({"object": True}, "load the page again"),
        ({"off": None}, "load the page again"),
    ],
)
def test_what_does_not_exist_is_told_in_a_sentence(client, changes, words):
    answer = client.post("/boxes", json=wish(**changes))
    assert answer.status_code == 400 and words in answer.json()["error"]


def test_requests_that_are_no_requests(client):
    for body in (b"", b"[]", b"{", b"\xff", b'"' + b"x" * 70_000):
        answer = client.post("/boxes", content=body)
        assert answer.status_code in (400, 413) and answer.json()["error"]
    assert client.post("/maps", json=wish()).status_code == 400
    for wrong in ({"map": 99}, {"map": 0, "head": 8}, {"map": 0, "head": -1}, {"map": 0, "head": "1"}):
        assert client.post("/maps", json=wish(**wrong)).status_code == 400
    assert client.get("/boxes").status_code == 405
    assert client.get("/../../etc/passwd").status_code == 404


def test_only_this_machine_and_this_page_are_answered(live):
    app = server.application(live)
    plain = TestClient(app, base_url=BASE)
    assert plain.get("/").status_code == 200
    assert plain.get("/", headers={"Host": "localhost:8517"}).status_code == 200
    for host in ("evil.example", "evil.example:8517", "127.0.0.1.evil.example"):  # DNS rebinding
        for path in ("/", "/images/0"):
            assert plain.get(path, headers={"Host": host}).status_code == 400
        own = {"Host": host, "Origin": f"http://{host}"}
        assert plain.post("/boxes", json=wish(), headers=own).status_code == 400
    for headers in (  # requests that pages of other sites can make a browser send
        {},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:9999"},
        {"Origin": BASE, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
    ):
        for path in ("/boxes", "/maps", "/images"):
            assert plain.post(path, json=wish(), headers=headers).status_code == 403
    assert plain.post("/boxes", json=wish(), headers=OWN).status_code == 200
    image = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
    assert plain.get("/images/0", headers=image).status_code == 403
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    answer = plain.get("/", headers=link)
    assert answer.status_code == 200
    assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
    assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert plain.get("/images/0").headers["Cache-Control"] == "no-store"


def test_images_that_are_sent(client, live, monkeypatch):
    answer = client.post("/images", params={"name": "../../x/street.png"}, content=png())
    assert answer.json() == {"id": "sent-1", "name": "street.png"}
    assert client.get("/images/sent-1").headers["Content-Type"] == "image/png"
    boxes = client.post("/boxes", json=wish(image="sent-1")).json()
    assert boxes["aspect"] == "40 / 30" and boxes["command"] == "headoff sweep street.png --off none"
    for contents, words in ((b"", "not an image"), (b"GIF89a", "not an image"), (png()[:50], "corrupt")):
        answer = client.post("/images", content=contents)
        assert answer.status_code == 400 and words in answer.json()["error"]
    monkeypatch.setattr(session, "MOST_PIXELS", 1000)
    assert "more than 1,000" in client.post("/images", content=png(40, 30)).json()["error"]
    monkeypatch.setattr(server, "MOST_BYTES", 50)
    answer = client.post("/images", content=png(10, 10))
    assert answer.status_code == 413 and "more than 50 bytes" in answer.json()["error"]


def test_the_oldest_image_that_was_sent_goes(client, live, monkeypatch):
    monkeypatch.setattr(session, "MOST_SENT", 2)
    for _ in range(3):
        client.post("/images", params={"name": "a.png"}, content=png())
    assert [image["id"] for image in live.images] == ["0", "1", "sent-2", "sent-3"]
    assert client.get("/images/sent-1").status_code == 400


def test_features_of_few_images_are_kept(live, monkeypatch):
    monkeypatch.setattr(session, "MOST_ENCODED", 1)
    for image in ("0", "1", "0"):
        assert live.boxes(Setting(image))["objects"]
        assert list(live._known) == [image]


def test_a_request_whose_page_has_gone_on_is_dropped():
    import anyio

    class Gone:
        async def is_disconnected(self):
            return True

    async def run():
        return await server._in_turn(Gone(), anyio.Lock(), lambda: pytest.fail("it was computed"))

    assert anyio.run(run).status_code == 204


def test_a_name_cannot_end_the_page_s_script(detector, tmp_path):
    path = tmp_path / "<script>alert(1)<script>.png"
    path.write_bytes(png())
    page = TestClient(server.application(Session(detector, [path])), base_url=BASE).get("/").text
    assert "alert(1)" in page and "<script>alert" not in page


def test_images_of_one_name_are_told_apart(detector, tmp_path):
    paths = [tmp_path / "a" / "x.png", tmp_path / "b" / "x.png", tmp_path / "y.png"]
    names = [image["name"] for image in Session(detector, paths).images]
    assert names == [str(paths[0]), str(paths[1]), "y.png"]


def test_commands_have_the_options_of_the_detector(tmp_path):
    from headoff.cli import parser

    words = ["live", "a b.jpg", "--model", "x.pth", "--no-dc5", "--short-side", "512", "--dtype", "float64"]
    origin = _origin(parser().parse_args(words))
    recipe = Recipe(origin, "a b.jpg", "L4H2=0.5", "mean", tmp_path / "r.safetensors", 0.7)
    assert recipe.command() == (
        "headoff sweep 'a b.jpg' --model x.pth --short-side 512 --no-dc5 --dtype float64 --off L4H2=0.5 "
        f"--ablate mean --references {tmp_path}/r.safetensors --confidence 0.7"
    )
    parser().parse_args(shlex.split(recipe.command())[1:])
    assert "headoff.load('x.pth', dilated=False, short_side=512, dtype='float64')" in recipe.program()
    assert Recipe(Origin(), None, "none").command() == "headoff sweep --off none"


def test_the_command_serves_until_ctrl_c(capsys, monkeypatch):
    seen = []

    def look(address):  # in the place of a browser
        seen.append(urllib.request.urlopen(address, timeout=20).status)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("webbrowser.open", look)
    assert main(["live", "--port", "0"]) == 0
    printed = capsys.readouterr()
    assert seen == [200]
    assert printed.out.startswith("headoff live: http://127.0.0.1:") and printed.out.endswith("live: ended\n")
    assert printed.err == "" and threading.active_count() < 20


def test_an_image_that_cannot_be_read_is_said_before_the_page_opens(capsys, tmp_path):
    path = tmp_path / "street.png"
    path.write_bytes(png()[:50])
    assert main(["live", str(path), "--port", "0"]) == 2
    assert "street.png' is truncated or corrupt" in capsys.readouterr().err
    assert main(["live", str(tmp_path / "none.png"), "--port", "0"]) == 2


def test_a_port_in_use_is_said(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["live", "--port", str(port)]) == 2
    assert f"port {port} of 127.0.0.1 cannot be used" in capsys.readouterr().err
    assert main(["live", "--port", "70000"]) == 2
    assert "--port 0 for any that is free" in capsys.readouterr().err


def test_a_missing_extra_is_said(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["live"]) == 2
    assert capsys.readouterr().err == (
        "headoff: error: headoff live needs Starlette and uvicorn, which are not installed: "
        "pip install 'headoff[live]'\n"
    )
