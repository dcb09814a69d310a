"""The extension's face: cffi types are opaque to the type checker."""

from typing import Any

ffi: Any
lib: Any
