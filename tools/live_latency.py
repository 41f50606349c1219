"""How long the live page takes from a click on a switch to the boxes, in headless Chromium.

    python tools/live_latency.py                   the bundled model on a bundled scene
    python tools/live_latency.py --size r50        a ResNet-50 DETR with random weights on an image of 800 x 1066
    python tools/live_latency.py --map             while relevance maps are asked for, too

A script in the page clicks on one switch after another, and measures the time to the frame after the one in which boxes
are drawn.
"""

import argparse
import copy
import json
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from statistics import median

import torch
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from headoff.bench.models import benchmark_model
from headoff.devices import set_threads
from headoff.live import server
from headoff.live.session import Session

SCRIPT = """
const seen = (kind) => new Promise((done) => document.addEventListener(kind, done, { once: true }));
const frame = () => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
const pause = (ms) => new Promise((done) => setTimeout(done, ms));
if (!document.getElementById("command").textContent) await seen("drawn");
if (MAP) { page.set({ map: 0 }); await seen("mapped"); }
const times = [];
for (let turn = 0; turn < TURNS; turn++) {
  const switches = document.querySelectorAll("#gates td button");
  const one = switches[(turn * 7) % switches.length];
  const drawn = seen("drawn");
  const start = performance.now();
  one.click();
  await drawn;
  await frame();
  times.push(performance.now() - start);
  await pause(PAUSE);
}
const objects = document.querySelectorAll("#found tr").length;
await fetch("measured", { method: "POST", body: JSON.stringify({ times, objects }) });
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("scenes", "r50"), default="scenes")
    parser.add_argument("--map", action="store_true", help="with the relevance map of the first object")
    parser.add_argument("--turns", type=int, default=60, help="clicks (default 60)")
    parser.add_argument("--pause", type=int, default=50, help="milliseconds between clicks (default 50)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    settings = parser.parse_args()
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        sys.exit("there is no Chromium")
    set_threads(settings.threads)
    model = benchmark_model(settings.size, torch.device("cpu"), torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image.png"
        model.image.save(image)
        # Random weights are sure of nothing: with a low confidence there are objects.
        confidence = 0.5 if settings.size == "scenes" else _confidence_for(model, 10)
        session = Session(
            model.detector,
            [image],
            confidence=confidence,
            explainer=lambda: copy.deepcopy(model.detector),
        )
        measured = _measure(session, browser, settings, folder)
    times = sorted(measured["times"])[:]
    print(
        f"{settings.size}, {settings.threads} threads, {measured['objects']} objects"
        f"{', with maps' if settings.map else ''}: median {median(times):.0f} ms, "
        f"90% {times[int(0.9 * len(times))]:.0f} ms, longest {times[-1]:.0f} ms of {len(times)} clicks"
    )


def _confidence_for(model, objects: int) -> float:
    """The confidence that leaves so many objects."""
    from headoff.detections import detect

    scores = detect(model.detector, model.image, 0.0).scores
    return float(scores[objects])


def _measure(session: Session, browser: str, settings: argparse.Namespace, folder: str) -> dict:
    """What the page measures: it posts that to the same server."""
    done, found = threading.Event(), {}
    app = server.application(session)

    async def measured(request: Request) -> Response:
        found.update(json.loads(await request.body()))
        done.set()
        return JSONResponse({})

    script = f"const TURNS = {settings.turns}, PAUSE = {settings.pause}, MAP = {str(settings.map).lower()};{SCRIPT}"
    page = next(route for route in app.routes if route.path == "/").endpoint

    def measuring(request: Request) -> Response:
        response = page(request)
        end = f'<script type="module">{script}</script></body>'
        text = response.body.decode().replace("</body>", end)
        return Response(text, media_type="text/html")

    app.routes[:0] = [Route("/measure", measuring), Route("/measured", measured, methods=["POST"])]
    bound = server.listen(0)
    address = f"http://{server.HOST}:{bound.getsockname()[1]}/measure"
    running = server.Server(app)
    serving = threading.Thread(target=running.run, kwargs={"sockets": [bound]})
    serving.start()
    process = subprocess.Popen(
        [
            browser,
            *("--headless", "--no-sandbox", "--disable-gpu", "--window-size=1500,1100"),
            *("--remote-debugging-port=0", f"--user-data-dir={folder}/profile", address),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        if not done.wait(100):
            sys.exit("the page measured nothing within 100 seconds")
    finally:
        process.terminate()
        process.wait()
        running.should_exit = True
        serving.join()
    return found


if __name__ == "__main__":
    main()
