"""The page, as the files in page/ have it: nothing from elsewhere, and a policy by which no text can be code."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

from arriero.serve.faults import ApiError

router = APIRouter()
FOLDER = Path(__file__).parent / "page"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """The page."""
    return _file("index.html")


@router.get("/page/{name}", include_in_schema=False)
async def part(name: str) -> Response:
    """A file that it needs."""
    if name not in {file.name for file in FOLDER.iterdir()}:
        raise ApiError(404, "no such file")
    return _file(name)


def _file(name: str) -> Response:
    file = FOLDER / name
    return Response(file.read_bytes(), media_type=f"{TYPES[file.suffix]}; charset=utf-8", headers=HEADERS)
