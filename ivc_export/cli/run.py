"""ivc-run: asks a bundle about pictures."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import PIL.Image
from rich.console import Console

from ivc_export import __version__
from ivc_export.bundle.bundle import Bundle
from ivc_export.cli import Parser, check_output, make_console, tell
from ivc_export.cli.backends import add_backend_options, given_libraries
from ivc_export.cli.bundles import add_bundle_argument, given_bundle
from ivc_export.cli.methods import add_method_options, given_method
from ivc_export.errors import UserError
from ivc_export.files import read_object
from ivc_export.report.overlay import count_kinds, overlay
from ivc_export.runtime.backends import find_backend, open_session
from ivc_export.runtime.chat import Chat, FollowUp
from ivc_export.runtime.interface import Timings
from ivc_export.runtime.pictures import open_picture
from ivc_export.runtime.processor import video_settings
from ivc_export.runtime.videos import Video
from ivc_export.selection.method import find_method
from ivc_export.text.sampling import GENERATION_CONFIG, Sampling, checkpoint_sampling, greedy_note

CHAT_HELP = "/image FILE and /video FILE add a picture or a video to your next question, /quit ends the chat"


def parser() -> Parser:
    """The command's options."""
    p = Parser(prog="ivc-run", description="Ask an exported model about pictures, on onnxruntime or TensorRT.")
    add_bundle_argument(p)
    p.add_argument("--image", type=Path, action="append", default=[], help="a picture; may be repeated")
    p.add_argument(
        "--video",
        type=Path,
        action="append",
        default=[],
        metavar="FILE|FOLDER",
        help="a video, or a folder of its frames, in the order of their names; may be repeated",
    )
    p.add_argument(
        "--fps", type=float, help="frames to take per second, or the rate of a folder's frames (default: the model's)"
    )
    p.add_argument("--max-frames", type=int, help="maximum frames to take of a video (default: the model's)")
    p.add_argument(
        "--prompt",
        help="the question; <image> and <video> mark the places of pictures and videos (default: before the text)",
    )
    p.add_argument("--system", metavar="TEXT", help="system message, instead of the chat template's")
    p.add_argument("--chat", action="store_true", help=f"read questions from standard input; {CHAT_HELP}")
    p.add_argument(
        "--follow-up",
        choices=get_args(FollowUp),
        default="again",
        help="for later questions of --chat: again prunes the whole conversation for each (default); compacted keeps "
        "the cache that earlier questions pruned, which is faster but answers worse",
    )
    p.add_argument("--ratio", type=float, help="fraction of visual tokens kept (default: the bundle's)")
    add_method_options(p, "default: the bundle's")
    p.add_argument("--max-tokens", type=int, default=128, help="maximum tokens of an answer (default: 128)")
    p.add_argument(
        "--sampling",
        choices=("greedy", "checkpoint"),
        help="greedy: the most likely token (default); checkpoint: the settings of its generation_config.json",
    )
    p.add_argument("--temperature", type=float, help="0 is greedy (default: --sampling's)")
    p.add_argument("--top-k", type=int, help="draw from this many most likely tokens, 0 is all (default: --sampling's)")
    p.add_argument(
        "--top-p", type=float, help="draw from the most likely tokens of this total probability (default: --sampling's)"
    )
    p.add_argument(
        "--repetition-penalty",
        type=float,
        help="above 1: tokens of the prompt and the answer become less likely (default: --sampling's)",
    )
    p.add_argument("--seed", type=int, default=0, help="seed of the random draws (default: 0)")
    add_backend_options(p)
    p.add_argument("--show", type=Path, metavar="PNG", help="write the picture with its kept tokens marked")
    p.add_argument("--json", action="store_true", help="print one JSON object per answer, and no text")
    p.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return p


def command(arguments: Sequence[str]) -> int:
    """Answer one question, or chat."""
    options = parser().parse_args(arguments)
    if options.prompt is None and not options.chat:
        raise UserError("there is no question: give one with --prompt, or chat with --chat")
    if options.chat and sys.stdin is None:
        raise UserError("--chat reads questions from standard input, which is closed: leave it open, or use --prompt")
    libraries, method = given_libraries(options, [options.backend]), given_method(options)
    if options.show:
        check_show(options.show, bool(options.image or options.video) or options.chat)
    if (options.fps is not None or options.max_frames is not None) and not options.video and not options.chat:
        raise UserError("--fps and --max-frames are for a video: give one with --video")
    videos = [Video(path, options.fps, options.max_frames) for path in options.video]
    bundle, console = given_bundle(options), make_console()
    method = find_method(bundle.manifest.selection, method)
    sampling = choose_sampling(bundle, options, console)
    images: list[PIL.Image.Image | Video] = [
        open_picture(image, partial(console.print, markup=False)) for image in options.image
    ]
    images += videos
    for video in videos:  # report mistakes before graphs are opened
        video_settings(bundle)
        video.open()
    backend = find_backend(options.backend)
    note = backend.before(bundle)
    if note:
        console.print(note, markup=False)
    with console.status("opening the graphs"):
        session = open_session(bundle, options.backend, **libraries)
        chat = Chat(
            session,
            options.ratio,
            sampling=sampling,
            system=options.system,
            method=method,
            follow_up=options.follow_up,
        )
    note = backend.after(session)
    if note:
        console.print(note, markup=False)
    if options.prompt is not None:
        answer(chat, options.prompt, images, options)
    if options.chat:
        go_on(chat, [] if options.prompt is not None else images, options, console)
    return 0


def choose_sampling(bundle: Bundle, options: argparse.Namespace, console: Console) -> Sampling:
    """The sampling of the options. If the user chose none, a note says what the checkpoint's settings are.

    Raises:
        UserError: a value is out of range, or the checkpoint's settings are missing, damaged or not supported.
    """
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "seed", "max_tokens")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.sampling == "checkpoint":
        return checkpoint_sampling(bundle.folder, **given)
    path = bundle.folder / GENERATION_CONFIG
    if options.sampling is None and path.is_file():
        note = greedy_note(read_object(path, "export the model again"), given)
        if note:
            console.print(note, markup=False)
    return Sampling(**given)


def check_show(path: Path, pictures: bool) -> None:
    """Check, before any work, that --show can be written.

    Raises:
        UserError: there is no picture to draw on, or no such format; see check_output.
    """
    if not pictures:
        raise UserError("there is no picture for --show to draw on: give one with --image")
    check_output(path)
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"{path} does not end in .png, .jpg or .webp: give it one of these endings")


def go_on(chat: Chat, images: list[PIL.Image.Image | Video], options: argparse.Namespace, console: Console) -> None:
    """Answer questions from standard input until it ends. A mistake ends only its question, not the chat."""
    if sys.stdin.isatty():
        console.print(CHAT_HELP, style="dim")
    while True:
        if sys.stdin.isatty():
            console.print("> ", end="")
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return
        asked: list[PIL.Image.Image | Video] = []
        try:
            command, _, rest = line.strip().partition(" ")
            if command == "/image":
                image = open_picture(Path(rest.strip()), partial(console.print, markup=False))
                chat.processor.picture(image)  # report now what the model cannot take
                images = [*images, image]
            elif command == "/video":
                video = Video(Path(rest.strip()), options.fps, options.max_frames)
                chat.processor.video(video)  # as above
                images = [*images, video]
            elif command.startswith("/"):
                raise UserError(f"there is no {command}: {CHAT_HELP}")
            elif line.strip():
                asked, images = images, []  # in any case: a question that fails loses its pictures
                answer(chat, line.strip(), asked, options)
        except UserError as error:
            if not sys.stdin.isatty():
                raise
            again = "; its pictures were dropped, and /image adds them again" if asked else ""
            tell(f"{error}{again}")


def answer(chat: Chat, prompt: str, images: Sequence[PIL.Image.Image | Video], options: argparse.Namespace) -> None:
    """Ask, print the answer as it comes, and draw the picture if that is wanted."""
    chat.conversation.timings = Timings()
    pieces = []
    for piece in chat.ask(prompt, images):
        pieces.append(piece)
        if not options.json:
            print(piece, end="", flush=True)
    print(json.dumps(answer_record(chat, "".join(pieces))) if options.json else "", flush=True)
    if options.show and chat.looks and chat.step is not None:
        panels = [panel for look in chat.looks for panel in chat.processor.panels(look)]
        overlay(panels, chat.step).save(options.show)


def answer_record(chat: Chat, text: str) -> dict[str, Any]:
    """The object that --json prints."""
    assert chat.step is not None
    seconds, runs = chat.conversation.timings.seconds, chat.conversation.timings.runs
    decode = sum(seconds.get(f"decode.{part}", 0.0) for part in ("prefix", "decoder")) / runs.get("decode.decoder", 1)
    counts = count_kinds(chat.step)
    total = sum(counts.values())
    return {
        "text": text,
        "tokens": chat.tokens,
        "finish": chat.finish,
        "ratio": chat.conversation.ratio,
        **chat.conversation.method.facts,
        "visual_tokens": {"total": total, "kept": total - counts["pruned"]} | counts,
        "pictures": [chat.processor.extents(look.size, look.grid) for look in chat.looks if look.kind == "image"],
        "videos": [
            {**chat.processor.extents(look.size, look.grid), "frames": [*look.frames], "fps": look.rate}
            for look in chat.looks
            if look.kind == "video"
        ],
        "prompt_tokens": chat.step.run.rows,
        "cache": {"rows": chat.conversation.cache.length, "bytes": chat.conversation.cache.bytes_used},
        "milliseconds": {stage: round(1000 * value, 3) for stage, value in seconds.items()}
        | {"decode_per_token": round(1000 * decode, 3)},
    }
