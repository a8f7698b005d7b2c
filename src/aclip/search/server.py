"""The page of an index: a few JSON and image endpoints over starlette, and three static files.

What a request names is a row of the index, so no other file can be reached. The model works for one request at a time.
"""

import base64
import functools
import hmac
import io
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Sequence
from importlib import resources
from pathlib import Path

import numpy as np
import torch
import uvicorn
from PIL import Image
from rich.console import Console
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from torch.nn import functional as F

from aclip.data import decode_image
from aclip.data.evaluation_set import limit_aspect
from aclip.errors import AclipError, BadSampleError, ConfigError, category
from aclip.evaluation.features import MaskedEncoder, encode_batch
from aclip.explanation import explain
from aclip.report.snapshots import heat_map, kept_patches
from aclip.run_folder import RunFolder
from aclip.search.store import Hit, Index

MAX_UPLOAD = 20 * 2**20  # bytes; `decode_image` limits the pixels
MAX_TEXT, MAX_TOP = 1000, 200
BLOCK_SIZE = 2  # patches; as `explain` shows them
LOOPBACK = ("127.0.0.1", "localhost", "::1")

_THUMBNAIL, _LARGE = 320, 1280  # longest sides in pixels
_POLICY = ("default-src 'none'; img-src 'self' blob: data:; style-src 'self'; script-src 'self'; connect-src 'self'; "
           "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
_HEADERS = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin", "Cache-Control": "no-store"}


def run(index: Index, host: str, port: int, password: str | None) -> None:
    """Print the address, and serve until SIGINT or SIGTERM."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}, port {port} ({error.strerror}): choose another --port") from error
    index.model  # noqa: B018 - loaded before the first request, and checked
    name = f"[{host}]" if ":" in host else host
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(f"open http://{name}:{listening.getsockname()[1]}/ (stop with Ctrl-C)")
    # uvicorn finishes what is running, then raises the signal again
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    server = uvicorn.Server(uvicorn.Config(
        application(index, password, check_host=host in LOOPBACK), log_level="warning", server_header=False,
        timeout_graceful_shutdown=1, limit_concurrency=200, access_log=False))
    try:
        server.run(sockets=[listening])
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
        listening.close()


def application(index: Index, password: str | None = None, *, check_host: bool = False) -> Starlette:
    """Return the page of an index, which asks for a password (HTTP Basic, any user) if it is given.

    `check_host` refuses requests for other names than this machine's loopback, which a web page could point there.
    """
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        """Let in who may come in, and send the headers that keep the page to itself."""
        foreign = request.headers.get("sec-fetch-site") == "cross-site" and request.url.path != "/"
        if foreign or (check_host and request.url.hostname not in LOOPBACK):
            response = Response("not from here", 403)
        elif password is not None and not _knows(password, request.headers.get("authorization", "")):
            response = Response("password needed", 401, {"WWW-Authenticate": 'Basic realm="aclip", charset="UTF-8"'})
        else:
            response = await call_next(request)
        response.headers.update(_HEADERS)
        return response

    page = _Page(index)
    files = [Route("/" if name == "page.html" else f"/{name}", _static(name, kind)) for name, kind in (
        ("page.html", "text/html"), ("page.css", "text/css"), ("page.js", "text/javascript"))]
    return Starlette(
        routes=[*files, Route("/api/index", page.about), Route("/api/search", page.search),
                Route("/api/similar/{row:int}", page.similar), Route("/api/upload", page.upload, methods=["POST"]),
                Route("/image/{row:int}", page.image), Route("/look/{row:int}", page.look)],
        middleware=[Middleware(BaseHTTPMiddleware, dispatch=guard)],
        exception_handlers={AclipError: _refuse, ValueError: _refuse,
                            IndexError: lambda *_: JSONResponse({"error": "no such image"}, 404)})


def _knows(password: str, authorization: str) -> bool:
    scheme, _, encoded = authorization.partition(" ")
    try:
        given = base64.b64decode(encoded, validate=True).partition(b":")[2]
    except ValueError:
        return False
    return scheme.lower() == "basic" and hmac.compare_digest(given, password.encode())


class _Page:
    """The endpoints; each but `upload` runs in a thread of its own."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self._computing, self._reading = threading.Lock(), threading.Lock()  # one request at a time
        self._thumbnail = functools.lru_cache(2048)(self._make_thumbnail)

    def about(self, _: Request) -> Response:
        facts = [("images", f"{len(self.index):,}"), ("from", "\n".join(self.index.description["sources"])),
                 *card(self.index)]
        return JSONResponse({"name": self.index.folder.name, "facts": facts, "has_text": self.index.model.has_text})

    def search(self, request: Request) -> Response:
        text, without = (request.query_params.get(name, "").strip()[:MAX_TEXT] for name in ("text", "without"))
        top = _top(request)
        if not text:
            rows = np.linspace(0, len(self.index) - 1, min(top, len(self.index)), dtype=np.int64).tolist()
            return self._answer(self.index.hits(rows, [0.0] * len(rows)), similarity=False)
        with self._computing:
            vector = self.index.encode_query([], [text], [without] if without else [])
        return self._nearest(vector, top)

    def similar(self, request: Request) -> Response:
        row, keep = request.path_params["row"], _keep(request)
        if keep == 1.0:
            return self._nearest(torch.from_numpy(self.index.features[row]).float(), _top(request))
        with self._reading:
            data = self.index.read(row)
        return self._nearest(self._encode(data, keep), _top(request))

    async def upload(self, request: Request) -> Response:
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > MAX_UPLOAD:
                return JSONResponse({"error": f"images of up to {MAX_UPLOAD // 2**20} MB can be searched for"}, 413)
        return await run_in_threadpool(
            lambda: self._nearest(self._encode(bytes(data), _keep(request)), _top(request)))

    def image(self, request: Request) -> Response:
        row = request.path_params["row"]
        if "large" not in request.query_params:
            return Response(self._thumbnail(row), media_type="image/jpeg")
        with self._reading:
            image = self.index.image(row, min_side=_LARGE)
        image.thumbnail((_LARGE, _LARGE))
        return _jpeg(image)

    def look(self, request: Request) -> Response:
        """Answer with the map of a text over an image, or without a text with the patches that are kept."""
        row, text = request.path_params["row"], request.query_params.get("text", "").strip()[:MAX_TEXT]
        with self._reading:
            image = self.index.image(row)
        with self._computing:
            (found,) = explain(self.index.model, [image], [text] if text else [], _keep(request))
        grid = found.attention.shape
        if text:
            limits = 0.0, float(found.maps.max())
            return _jpeg(heat_map(found.image, torch.from_numpy(found.maps[0]), grid, limits))
        return _jpeg(kept_patches(found.image, torch.from_numpy(found.kept.ravel()).nonzero()[:, 0], grid))

    def _encode(self, data: bytes, keep: float) -> torch.Tensor:
        model = self.index.model
        with self._computing, torch.inference_mode():
            pixels = model.preprocess(limit_aspect(decode_image(data)))[None]
            encoder = model if keep == 1.0 else MaskedEncoder(model, keep, block_size=BLOCK_SIZE)
            return F.normalize(encode_batch(encoder, pixels, model.device)[0].cpu(), dim=0)

    def _nearest(self, vector: torch.Tensor, top: int) -> Response:
        similarity, rows = self.index.nearest(vector[None], top)
        return self._answer(self.index.hits(rows[0].tolist(), similarity[0].tolist()))

    def _answer(self, hits: Sequence[Hit], *, similarity: bool = True) -> Response:
        return JSONResponse({"hits": [{
            "row": hit.row, "name": hit.name, "similarity": hit.similarity if similarity else None,
            "caption": hit.captions[0][:MAX_TEXT] if hit.captions else ""} for hit in hits]})

    def _make_thumbnail(self, row: int) -> bytes:
        with self._reading:
            return bytes(_jpeg(self.index.thumbnail(row, _THUMBNAIL)).body)


def card(index: Index) -> list[tuple[str, str]]:
    """Return what is known of the model of an index: names and values."""
    model, folder = index.model, RunFolder(Path(str(index.description["model"])))
    facts = [("model", str(index.description["model"] or model.name)),
             ("input", f"{model.image_size[0]} x {model.image_size[1]} pixels")]
    if not folder.exists():
        return facts
    config = folder.config()
    facts += [("trained by", f"{config.recipe.name}: {config.recipe.title}"), ("architecture", config.model),
              ("trained on", "\n".join(config.data))]
    if model.samples_seen is not None:
        facts.append(("samples seen", f"{model.samples_seen:,}"))
    newest = {(record.get("set"), record.get("evaluator")): record for record in folder.records("evaluations")}
    for (held, evaluator), record in newest.items():
        metrics = ", ".join(f"{name} {value:.3g}" for name, value in record.get("metrics", {}).items())
        facts.append((f"{held}, {evaluator}", metrics))
    return facts


def _static(name: str, kind: str) -> Callable[[Request], Response]:
    content = resources.files("aclip.search").joinpath("page", name).read_bytes()
    return lambda _: Response(content, media_type=kind)


def _keep(request: Request) -> float:
    return min(1.0, max(0.05, float(request.query_params.get("keep", "1"))))


def _top(request: Request) -> int:
    return min(MAX_TOP, max(1, int(request.query_params.get("top", "24"))))


def _jpeg(image: Image.Image) -> Response:
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=88)
    return Response(file.getvalue(), media_type="image/jpeg")


def _refuse(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": category(str(error)) if isinstance(error, BadSampleError) else str(error)}, 400)
