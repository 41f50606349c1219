"""The live page in headless Chromium: switches, choices, maps, keys and its address."""

import threading

import pytest
from test_page_in_a_browser import CHROMIUM, seen_at, with_script

pytest.importorskip("starlette", reason="the live page needs Starlette: pip install 'headoff[live]'")
pytest.importorskip("uvicorn", reason="the live page needs uvicorn: pip install 'headoff[live]'")
from starlette.responses import HTMLResponse  # noqa: E402
from starlette.routing import Route  # noqa: E402

import headoff  # noqa: E402
from headoff.live import server  # noqa: E402
from headoff.live.session import Session  # noqa: E402

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")

SCRIPT = """
const settled = async () => {
  for (let turn = 0; turn < 400; turn++) {
    await new Promise((done) => setTimeout(done, 25));
    if ($("command").textContent && !document.documentElement.classList.contains("stale")) break;
  }
};
const next = async (act) => {
  const drawn = new Promise((done) => document.addEventListener("drawn", done, { once: true }));
  act();
  await drawn;
};
const cell = (layer, head) => document.querySelector(`#gates [data-layer="${layer}"][data-head="${head}"]`);
const look = () => ({
  title: $("picture-title").textContent,
  off: all("#gates td button").filter((one) => one.getAttribute("aria-pressed") === "false").length,
  marks: all(".mark").length,
  objects: all("#found tr").map((row) => [...row.cells].map((one) => one.textContent)),
  address: decodeURIComponent(location.hash.replaceAll("+", " ")),
  command: $("command").textContent,
});
await settled();
seen.first = look();
await next(() => cell(4, 2).click());
seen.one = look();
await next(() => press("2"));
seen.column = look();
const slider = cell(0, 5).nextSibling;
await next(() => { slider.value = 0.5; slider.dispatchEvent(new Event("input")); });
seen.part = [look(), cell(0, 5).textContent];
await next(() => press("-"));
seen.allOff = look();
await next(() => press("+"));
seen.allOn = look();

// One object alone, another site, another ablation kind.
await next(() => choose("object", 1));
await next(() => choose("ablation", "mean"));
choose("site", "decoder_self");
await next(() => all("#gates th button").find((one) => one.textContent === "L5").click());
seen.alone = look();
choose("site", "decoder_cross");
seen.elsewhere = $("elsewhere").textContent;

// Many changes at once: what is shown in the end is the last one.
for (let head = 0; head < 6; head++) press(String(head));
await next(() => {});
const last = () => $("command").textContent.includes("H0+1+2+3+4+5") || $("command").textContent.includes("H0-5");
for (let turn = 0; turn < 200 && !last(); turn++) await new Promise((done) => setTimeout(done, 25));
seen.fast = look();

choose("object", -1);
await next(() => press("+"));
choose("map", 1);
await settled();
const map = $("evidence").src;
choose("layer", 0);
seen.map = [map.slice(0, 22), $("evidence").src !== map, $("map-told").textContent, $("evidence").offsetWidth > 0];
choose("head", 4);
await settled();
const attention = () => $("map-told").textContent.startsWith("Attention");
for (let turn = 0; turn < 400 && !attention(); turn++) await new Promise((done) => setTimeout(done, 25));
seen.head = [$("evidence").src !== map, $("map-told").textContent];
press("h");
seen.next = $("head").value;
choose("head", -1);
choose("boxes");
seen.bare = all(".mark").filter((mark) => mark.offsetWidth).length;

page.set({ off: "L9H9" });
await next(() => {});
seen.error = [$("error").offsetHeight > 0, $("error").textContent];
await next(() => press("+"));
seen.recovered = $("error").hidden;

// A link to an object that does not exist.
location.hash = "#off=H1&object=77";
await next(() => {});
seen.missing = [$("error").textContent, all(".mark").length > 0];
"""


@pytest.fixture
def address():
    """Serves the page with the script at its end, at /seen."""
    app = server.application(Session(headoff.load("scenes"), [headoff.sample_image(0)]))
    page = next(route.endpoint for route in app.routes if route.path == "/")

    def seen(request):
        # Without the policy, which rightly forbids the test's script.
        return HTMLResponse(with_script(page(request).body.decode(), SCRIPT))

    app.routes.append(Route("/seen", seen))
    bound = server.listen(0)
    running = server.Server(app)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [bound]})
    thread.start()
    yield f"http://127.0.0.1:{bound.getsockname()[1]}/seen"
    running.should_exit = True
    thread.join()


def test_every_control_of_the_live_page(tmp_path, address):
    seen, errors = seen_at(tmp_path, f"{address}#off=last+1&layer=3")
    # The server's answer to the wrong text may be in the console, and is on the page.
    assert all("400" in error for error in errors)
    first = seen["first"]
    assert first["title"] == "last 1 off" and first["off"] == 6 and len(first["objects"]) == 4
    assert first["command"] == "headoff sweep --off 'last 1'"
    # The text of a link is kept until something is switched.
    assert seen["one"]["off"] == 7 and seen["one"]["address"] == "#off=H7,L4H2&layer=3"
    assert seen["column"]["off"] == 6 and seen["column"]["address"] == "#off=H7&layer=3"
    part, text = seen["part"]
    assert text == ".50" and part["command"] == "headoff sweep --off H7,L0H5=0.5"
    assert seen["allOff"]["off"] == 48 and {row[1] for row in seen["allOff"]["objects"]} == {"Llost"}
    assert seen["allOn"]["off"] == 0 and {row[1] for row in seen["allOn"]["objects"]} == {"Kkept"}
    assert seen["allOn"]["address"] == "#layer=3" and seen["allOn"]["marks"] == 4
    assert seen["alone"]["command"] == "headoff sweep --off 'object 1: decoder_self L5' --ablate mean"
    assert "decoder_self" in seen["elsewhere"]
    assert seen["fast"]["off"] == 36 and "decoder_self L5; H0+1+2+3+4+5" in seen["fast"]["address"]
    kind, changed, told, visible = seen["map"]
    assert kind == "data:image/png;base64," and changed and visible
    assert told.startswith("Relevance of #1 circle after layer 0")
    changed, told = seen["head"]
    assert changed and told.startswith("Attention of head 4 of layer 0 at the query of #1 circle: ")
    assert "its greatest there with none off" in told and seen["next"] == "5"
    assert seen["bare"] == 0
    there, text = seen["error"]
    assert there and "names layer 9" in text and seen["recovered"]
    message, drawn = seen["missing"]
    assert message.startswith("object 77 does not exist") and drawn
