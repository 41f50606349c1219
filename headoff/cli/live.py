"""`headoff live`: a local page with a switch for every head."""

from __future__ import annotations

import argparse
from typing import Any

from headoff.cli.options import (
    add_confidence_option,
    add_detector_options,
    add_image_argument,
    add_references_option,
    whole,
)

DEFAULT_PORT = 8517

EPILOG = f"""\
on the page:
  Switch any head of any layer off, or down to a fraction, for all objects or for one, in cross-attention or at
  another site, with any ablation kind: boxes, outcomes and the chosen relevance map follow at once. The image is
  encoded once, only the decoder runs again. The address keeps everything, so a link shows the same while the
  command runs, and the page gives the `headoff sweep` line and the Python that find the same.

who can reach it:
  Only programs on this machine: it listens on 127.0.0.1, and answers to no page of another site. It shows the
  images that are named here and those that the page is given; it reads no other file and writes none.

examples:
  headoff live                                       the bundled model on a bundled scene
  headoff live street.jpg --model detr-resnet-50
  headoff live photos/ --no-browser --port 9000      on another machine: ssh -L 9000:127.0.0.1:9000 MACHINE,
                                                     then open http://127.0.0.1:9000/ here

It ends with Ctrl-C. It needs the extra: pip install 'headoff[live]'. The default port is {DEFAULT_PORT}.
"""


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "live",
        help="a local page with a switch for every head, whose boxes and maps follow",
        description="Open a page with a switch and a slider for every head; boxes, outcomes and relevance maps follow.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_image_argument(parser)
    parser.add_argument(
        "--port",
        type=whole,
        default=DEFAULT_PORT,
        metavar="N",
        help=f"port of 127.0.0.1 (default {DEFAULT_PORT}); 0 for any that is free",
    )
    parser.add_argument(
        "--no-browser", action="store_true", help="print the address of the page, do not open a browser"
    )
    add_confidence_option(parser)
    add_references_option(parser)
    add_detector_options(parser)
    parser.set_defaults(run=run)


def run(settings: argparse.Namespace) -> int:
    """Run the command."""
    import contextlib
    import threading
    import webbrowser

    from headoff.ablation import load_references
    from headoff.cli.detectors import load_detector
    from headoff.cli.images import images_at
    from headoff.errors import ImageError, SettingError

    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise SettingError(
            "headoff live needs Starlette and uvicorn, which are not installed: pip install 'headoff[live]'"
        ) from None
    from headoff.live.server import HOST, Server, application, listen
    from headoff.live.session import Session, Setting

    # Wrong options are reported before the weights are read.
    images = images_at(settings.images)
    if settings.references is not None:
        load_references(settings.references)
    bound = listen(settings.port)
    with bound:
        session = Session(
            load_detector(settings),
            images.paths,
            origin=_origin(settings),
            references=settings.references,
            confidence=settings.confidence,
            explainer=lambda: load_detector(settings, quiet=True),
        )
        # Encoded before the page asks; the page tells which of several images cannot be read.
        with contextlib.suppress(*([ImageError] if len(images.paths) > 1 else [])):
            session.boxes(Setting(session.images[0]["id"]))
        address = f"http://{HOST}:{bound.getsockname()[1]}/"

        def started() -> None:
            print(f"headoff live: {address} (Ctrl-C ends it)", flush=True)
            if not settings.no_browser:
                # In a thread, as some browsers do not return before they are closed.
                threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()

        try:
            Server(application(session), started).run(sockets=[bound])
        except KeyboardInterrupt:
            pass
    print("\nheadoff live: ended")
    return 0


def _origin(settings: argparse.Namespace) -> Any:
    """How to get the same detector again: options that are not the default."""
    from headoff.cli.detectors import model_choice
    from headoff.live.commands import Origin

    choice = model_choice(settings)
    load = {"heads": choice.heads, "dilated": choice.dilated, "class_names": choice.class_names}
    load |= {"short_side": choice.short_side}
    words = [] if settings.model == "scenes" else ["--model", settings.model]
    for name in ("heads_per_layer", "classes", "short_side", "threads"):
        value = getattr(settings, name)
        words += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    words += {None: [], True: ["--dc5"], False: ["--no-dc5"]}[settings.dc5]
    for name, default in (("attention", "auto"), ("device", None), ("dtype", "float32")):
        value = getattr(settings, name)
        if value != default:
            words += [f"--{name}", value]
            load[name] = value
    return Origin(settings.model, {name: value for name, value in load.items() if value is not None}, words)
