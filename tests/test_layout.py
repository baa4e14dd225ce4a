"""Files and functions stay short, and the documentation names files that exist."""

import ast
import re

import pytest
from conftest import ROOT

FOLDERS = ('core', 'model', 'dataset', 'engine', 'report', 'utils', 'benchmarks', 'figures', 'scripts', 'tests')
CODE = sorted([*ROOT.glob('*.py'), *(path for folder in FOLDERS for path in (ROOT / folder).rglob('*.py'))])
PAGES = [ROOT / name for name in ('README.md', 'MODELS.md', 'CONTRIBUTING.md')]
PAGES += sorted([*ROOT.glob('docs/*.md'), *ROOT.glob('benchmarks/*.md')])
LINK = re.compile(r'\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)')
NAMED = re.compile(rf'`((?:{"|".join(FOLDERS)}|docs)/[\w/]+\.\w+)`')


def lines_of(path):
    return path.read_text().count('\n')


def test_python_files_have_at_most_350_lines_and_the_readme_160():
    assert len(CODE) > 50
    assert not {str(path): lines_of(path) for path in CODE if lines_of(path) > 350}
    assert lines_of(ROOT / 'README.md') <= 160


def test_functions_have_at_most_60_lines():
    long = {}
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 60:
                long[f'{path}:{node.lineno} {node.name}'] = node.end_lineno - node.lineno + 1
    assert not long


def test_the_steps_in_the_design_name_functions_of_their_files():
    text = (ROOT / 'docs/design.md').read_text()
    rows = re.findall(
        r'^\| (?:→ )?`([\w/]+\.py)` \| ([^|]+) \|', text[text.index('## A step of stage 1') :], re.MULTILINE
    )
    assert len(rows) > 12
    missing = []
    for file, functions in rows:
        code = (ROOT / file).read_text()
        for part in re.findall(r'`\.?([\w.]+)`', functions.split('→')[0].split(' of ')[0]):
            missing += [
                f'{file}: {name}' for name in part.split('.') if not re.search(rf'\b(def|class) {name}\b', code)
            ]
    assert not missing


def anchors(path):
    """The anchors of a page's headings, by the rule of GitHub."""
    text = re.sub(r'^```.*?^```', '', path.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r'^#+ (.+)$', text, re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', PAGES, ids=[str(path.relative_to(ROOT)) for path in PAGES])
def test_links_and_named_files_exist(page):
    text = page.read_text()
    missing = [name for name in NAMED.findall(text) if not (ROOT / name).is_file()]
    for name, anchor in LINK.findall(text):
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(f'{name}#{anchor}' if anchor else name)
    assert not missing
