# The extension that cffi makes; untyped, so its callers convert what they get.
from typing import Any

ffi: Any
lib: Any
