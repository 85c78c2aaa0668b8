"""Reads pictures of requests: data URLs and, if the operator allows it, addresses on the public internet."""

from __future__ import annotations

import base64
import binascii
import http.client
import io
import ipaddress
import re
import socket
import ssl
import time
import warnings
from urllib.parse import urljoin, urlsplit

import PIL.Image

from ivc_export.errors import UserError
from ivc_export.runtime.pictures import open_picture
from ivc_export.serve.errors import RequestError

DATA = re.compile(r"data:image/(?:png|jpe?g|webp|gif|bmp);base64,", re.IGNORECASE)
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
REMOTE_SECONDS, REMOTE_BYTES, REDIRECTS = 10.0, 20 << 20, 3


def read_data_url(url: str, where: str) -> bytes:
    """Read the file in a data URL.

    Raises:
        RequestError: it is not a picture in base64.
    """
    head = DATA.match(url)
    if head is None:
        raise RequestError(f"{where} is not a data URL: send a PNG, JPEG, WebP, GIF or BMP file in base64", param=where)
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{where} is not valid base64 ({error}): encode the picture again", param=where) from error


def decode(data: bytes, most_pixels: int) -> PIL.Image.Image:
    """Decode the picture in a file, in RGB.

    Raises:
        UserError: it is not a picture, or too large; see open_picture.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            opened = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
    except PIL.Image.DecompressionBombError as error:
        raise UserError(
            f"a picture has too many pixels, and this server's limit is {most_pixels:,}: scale it down"
        ) from error
    except Exception as error:  # damaged files make Pillow's readers raise almost anything
        raise UserError("a picture cannot be read: send a PNG, JPEG, WebP, GIF or BMP file") from error
    with opened:
        if opened.width * opened.height > most_pixels:
            raise UserError(
                f"a picture has {opened.width} x {opened.height} pixels, but this server's limit is "
                f"{most_pixels:,}: scale it down"
            )
        try:
            return open_picture(opened)
        except UserError as error:
            sentence = str(error).partition(" cannot be read as a picture ")
            raise UserError(f"the picture {''.join(sentence[1:])}" if sentence[1] else str(error)) from error


def fetch(url: str, where: str) -> bytes:
    """Fetch a file from the public internet.

    Each address, also of redirections, is looked up once, and the connection goes to the result.

    Raises:
        RequestError: the address is not public, or the file is missing, too large or arrives too slowly.
    """
    deadline = time.monotonic() + REMOTE_SECONDS
    try:
        for _ in range(REDIRECTS + 1):
            answer = get(url, where, deadline)
            if isinstance(answer, bytes):
                return answer
            url = urljoin(url, answer)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise RequestError(f"{where} cannot be fetched: send the picture as a data URL", param=where) from error
    raise RequestError(
        f"{where} is redirected more than {REDIRECTS} times: send the picture as a data URL", param=where
    )


def get(url: str, where: str, deadline: float) -> bytes | str:
    """Fetch a file, or the address to which the server redirects.

    Raises:
        RequestError: see fetch. OSError, HTTPException: the connection fails.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise RequestError(
            f"{where} is not an http or https address: send one, or send the picture as a data URL", param=where
        )
    port = parts.port or (443 if parts.scheme == "https" else 80)
    address = public_address(parts.hostname, port, where)
    raw = socket.create_connection((address, port), timeout=left(deadline))
    with raw:
        stream = raw
        if parts.scheme == "https":
            stream = ssl.create_default_context().wrap_socket(raw, server_hostname=parts.hostname)
        connection = http.client.HTTPConnection(parts.hostname, port)
        connection.sock = stream
        with stream:
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", target, headers={"Accept": "image/*", "Connection": "close"})
            answer = connection.getresponse()
            if answer.status in (301, 302, 303, 307, 308):
                return answer.headers.get("Location", "")
            if answer.status != 200:
                raise RequestError(f"{where} answers with HTTP status {answer.status}: check the address", param=where)
            pieces, size = list[bytes](), 0
            while True:
                stream.settimeout(left(deadline))
                piece = answer.read1(1 << 16)
                if not piece:
                    return b"".join(pieces)
                pieces.append(piece)
                size += len(piece)
                if size > REMOTE_BYTES:
                    raise RequestError(
                        f"{where} has more than {REMOTE_BYTES >> 20} MiB: send a smaller picture", param=where
                    )


def public_address(host: str, port: int, where: str) -> str:
    """An address of a host whose addresses are all public.

    Raises:
        RequestError: one is not. OSError: there is no such host.
    """
    found = [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    for text in found:
        address = ipaddress.ip_address(text.partition("%")[0])
        mapped = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None)
        if not all(a.is_global and not a.is_multicast for a in (address, mapped) if a is not None):
            raise RequestError(f"{where} is not a public address: send the picture as a data URL", param=where)
    return found[0]


def left(deadline: float) -> float:
    """Seconds until then.

    Raises:
        OSError: the time is over.
    """
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("too slow")
    return seconds
