"""Templates, and the style sheet and the script, whose names hold a digest of what is in them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ipguard.admin import _texts
from ipguard.admin._http import SAFE_HEADERS, Response

_HERE: Final = Path(__file__).resolve().parent
_TYPES: Final = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_YEAR: Final = 31_536_000


class Assets:
    """The files that pages refer to, held in memory.

    Attributes:
        names: What a file is called in URLs, by its own name.
    """

    def __init__(self) -> None:
        self._files: dict[str, tuple[str, bytes]] = {}
        self.names: dict[str, str] = {}
        for path in sorted((_HERE / "static").iterdir()):
            content = path.read_bytes()
            digest = hashlib.sha256(content).hexdigest()[:16]
            name = f"{path.stem}.{digest}{path.suffix}"
            self.names[path.name] = name
            self._files[name] = (f"{_TYPES[path.suffix]}; charset=utf-8", content)

    def get(self, name: str) -> Response | None:
        """Return a file under the name that holds its digest; it may be kept for ever."""
        found = self._files.get(name)
        if found is None:
            return None
        kind, content = found
        kept = ("Cache-Control", f"public, max-age={_YEAR}, immutable")
        return Response(
            status=200, headers=(("Content-Type", kind), kept, *SAFE_HEADERS), body=content
        )


def _when(at: datetime) -> Markup:
    return Markup('<time datetime="{}">{}</time>').format(
        at.strftime("%Y-%m-%dT%H:%M:%SZ"), _texts.moment(at)
    )


class Templates:
    """The templates: everything that goes into one is escaped, and nothing may be missing."""

    def __init__(self, assets: Assets) -> None:
        self._environment = Environment(
            loader=FileSystemLoader(_HERE / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
        )
        self._environment.globals.update(assets=assets.names)
        self._environment.filters.update(
            when=_when,
            count=_texts.count,
            understood=_texts.understood,
            lasting=_texts.length,
            shut=_texts.shut,
            attempts=_texts.attempts,
            done=_texts.done,
            more=_texts.more,
        )

        for name in self._environment.list_templates():
            self._environment.get_template(name)  # now, and not before the first who asks for it

    def render(self, name: str, values: Mapping[str, Any]) -> str:
        """Render a template."""
        return self._environment.get_template(name).render(values)


@functools.cache
def loaded() -> tuple[Assets, Templates]:
    """Return what is on disk, read once for all pages of this process."""
    assets = Assets()
    return assets, Templates(assets)
