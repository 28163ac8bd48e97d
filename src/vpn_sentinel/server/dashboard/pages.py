"""The templates and static files of the dashboard, loaded once."""

from hashlib import blake2b
from importlib import resources
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined

from vpn_sentinel import __version__

_TYPES: Final = {
    "css": "text/css",
    "js": "text/javascript",
    "svg": "image/svg+xml",
}


class Pages:
    """Renders pages. `build` changes with every file: a browser with an older page then knows that it must reload."""

    def __init__(self) -> None:
        folder = resources.files(__package__) / "static"
        self.files: dict[str, tuple[str, bytes]] = {
            f.name: (_TYPES[f.name.rpartition(".")[2]], f.read_bytes()) for f in folder.iterdir()
        }
        environment = Environment(
            loader=PackageLoader(__package__, "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
        )
        self.build = self._build(environment)
        environment.globals.update(build=self.build, version=__version__)
        self._environment = environment

    def render(self, template: str, **context: Any) -> str:
        return self._environment.get_template(template).render(context)

    def _build(self, environment: Environment) -> str:
        digest = blake2b(__version__.encode(), digest_size=6)
        for _, (_, content) in sorted(self.files.items()):
            digest.update(content)
        for name in sorted(environment.list_templates()):
            source, _, _ = environment.loader.get_source(environment, name) if environment.loader else ("", None, None)
            digest.update(source.encode())
        return digest.hexdigest()
