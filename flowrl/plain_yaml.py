"""YAML files that are one mapping, read without surprises."""

import re
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any

import yaml

from flowrl.errors import UserError


def read_yaml_mapping(path: Path) -> dict[Any, Any]:
    """Read a YAML file that is one mapping; keys are unique and nothing is repeated by reference.

    Raises:
        UserError: unreadable, not YAML, a duplicate key, or no mapping.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not plain YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a mapping from option names to values")
    return data


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but keys are names, each given once, and nothing is repeated by reference.

    PyYAML lets the last of two equal keys win, and a few lines of references can stand for gigabytes.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("references (*name) are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag.endswith(":merge"):
                raise yaml.YAMLError("a key must be a name")
            if key_node.value in seen:
                raise yaml.YAMLError(f"key {short_repr(key_node.value)} is given twice")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


# YAML 1.1, which PyYAML reads, takes 1e-4 for a string.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
