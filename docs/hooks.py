"""MkDocs calls this module: it adds generated text to pages, and pages and files that live outside docs/ to the site.

Links in the documents are those of the repository, so that they work in any viewer; here they become links of the site.
"""

import html
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "explanation/benchmark-scripts.md",
    "deploy/ENDPOINTS.md": "reference/s3-servers.md",
    "deploy/README.md": "reference/aws-stack.md",
    "deploy/slurm/README.md": "how-to/clusters.md",
    "ARCHITECTURE.md": "explanation/architecture.md",
    "README.md": "index.md",
}
"""Where a document outside docs/ stands on the site."""

WRITTEN = {"README.md", "ARCHITECTURE.md"}
"""Those of PAGES for which docs/ has a page of its own."""

FILES = "files"
"""Folder of the site for other files of the repository that a page links to."""

WORKER = "https://unpkg.com/iframe-worker/shim"
"""What the theme loads for the search in pages opened from a disk; docs/worker.js does the same without a network."""

LINK = re.compile(r"(?P<before>\]\()(?P<target>(?!https?:|mailto:|#)[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
LOADED = re.compile(r'<(?:script|img|link|iframe|source)[^>]*(?:src|href)="(https?://[^"]+)"')
EXTERNAL = re.compile(r'<a [^>]*href="(https?://[^"]+)"')
GENERATED = re.compile(r"^<!-- generated: (?P<name>\S+) ?(?P<argument>\S*) -->$", re.MULTILINE)
_external: set[str] = set()


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents outside docs/, and each file that a page links to."""
    for source, page in PAGES.items():
        if source not in WRITTEN:
            files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    linked = {target for file in files.documentation_pages() for target in _outside(file)}
    for target in sorted(linked - PAGES.keys()):
        files.append(File.generated(config, f"{FILES}/{target}", abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001 - MkDocs names them
    """Fill in what is generated, and turn the repository's links into the site's."""
    filled = GENERATED.sub(lambda found: _GENERATORS[found["name"]](found["argument"]), markdown)
    here = posixpath.dirname(page.file.src_uri)

    def turned(found: re.Match[str]) -> str:
        target = _in_repository(page.file, found["target"])
        if target is None or (not target.startswith("docs/") and not (ROOT / target).is_file()):
            return found[0]
        place = target.removeprefix("docs/") if target.startswith("docs/") else PAGES.get(target, f"{FILES}/{target}")
        return f"{found['before']}{posixpath.relpath(place, here or '.')}{found['anchor'] or ''})"

    return LINK.sub(turned, filled)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:  # noqa: ARG001
    """Load nothing from the network; raise PluginError if something is loaded all the same. Note where the page leads outside."""
    output = output.replace(WORKER, posixpath.relpath("worker.js", posixpath.dirname(page.url) or "."))
    if loaded := LOADED.findall(output):
        raise PluginError(f"{page.url} loads {', '.join(loaded)}; a page must be readable without a network")
    _external.update(EXTERNAL.findall(output))
    return output


def on_post_template(output_content: str, template_name: str, config: MkDocsConfig) -> str:  # noqa: ARG001
    """Do the same for pages that are not written in Markdown."""
    return output_content.replace(WORKER, "/worker.js")


def on_post_build(config: MkDocsConfig) -> None:
    """List the links that lead outside, which are not followed."""
    Path(config.site_dir, "external-links.txt").write_text("".join(f"{url}\n" for url in sorted(_external)))


def decisions(_: str = "") -> str:
    """List the decisions by subject, newest first."""
    subjects: dict[str, list[str]] = {}
    for path in sorted((ROOT / "docs" / "decisions").glob("2*.md"), key=lambda path: path.name[:10], reverse=True):
        title, _, dated = path.read_text().split("\n", 3)[:3]
        date, subject = dated.split(", ")
        subjects.setdefault(subject, []).append(f"- [{title.removeprefix('# ')}]({path.name}) ({date})")
    return "\n\n".join(f"## {subject.capitalize()}\n\n" + "\n".join(subjects[subject]) for subject in sorted(subjects))


def command_line(_: str = "") -> str:
    """Write down each command: its help, its usage and its options."""
    cli = import_module("gradsharding.cli.main").cli
    return "\n\n".join(_command(command, context) for command, context in _commands(cli))


def public(package: str) -> str:
    """Ask mkdocstrings for each public name of a package, from the module that defines it."""
    module = import_module(package)
    places = ((name, getattr(module, name)) for name in sorted(module.__all__))
    found = (f"{getattr(thing, '__module__', package)}.{getattr(thing, '__qualname__', name)}" for name, thing in places)
    return "\n\n".join(f"::: {place}" for place in found if not place.startswith("gradsharding.errors."))  # they have a page of their own


_GENERATORS: Mapping[str, Callable[[str], str]] = {"decisions": decisions, "command-line": command_line, "public": public}


def _commands(cli: click.Group) -> Iterator[tuple[click.Command, click.Context]]:
    top = click.Context(cli, info_name="gradsharding")
    yield cli, top
    for name in cli.list_commands(top):
        _, command, _ = cli.resolve_command(top, [name])  # loads a command of another package, which the list alone does not
        assert command
        yield command, click.Context(command, info_name=name, parent=top)


def _command(command: click.Command, context: click.Context) -> str:
    """Write a command as a section."""
    usage = command.get_usage(context).removeprefix("Usage: ")
    options = [param.get_help_record(context) for param in command.params if isinstance(param, click.Option)]
    rows = [f"| `{_cell(names)}` | {_cell(_plain(text))} |" for names, text in filter(None, options)]
    table = ["| option | |", "|---|---|", *rows] if rows else []
    return "\n".join([f"## {context.command_path}", "", f"```text\n{usage}\n```", "", *_help(command.help or ""), "", *table])


def _help(text: str) -> Iterable[str]:
    """Turn a command's help into Markdown: blocks that click must not wrap, marked by a backspace, are preformatted."""
    for paragraph in re.sub(r"^ {0,4}", "", text, flags=re.MULTILINE).replace("\b\n", "\b").split("\n\n"):
        yield f"```text\n{paragraph.removeprefix(chr(8)).rstrip()}\n```\n" if paragraph.startswith("\b") else f"{_plain(paragraph)}\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _plain(text: str) -> str:
    return re.sub(r"([*_\[\]])", r"\\\1", html.escape(text, quote=False))


def _outside(file: File) -> Iterator[str]:
    """Name the files of the repository outside docs/ that a page links to."""
    for found in LINK.finditer(file.content_string):
        target = _in_repository(file, found["target"])
        if target and not target.startswith("docs/") and (ROOT / target).is_file():
            yield target


def _in_repository(file: File, target: str) -> str | None:
    """Resolve a link of a page to a path in the repository; None if it leaves it."""
    sources = {page: source for source, page in PAGES.items() if source not in WRITTEN}
    home = posixpath.dirname(sources.get(file.src_uri, f"docs/{file.src_uri}"))
    found = posixpath.normpath(posixpath.join(home, target))
    return None if found.startswith("..") else found
