"""These tests drive a real vLLM engine: `make test-vllm` makes an environment that has one, and runs them."""

from __future__ import annotations

from importlib.util import find_spec

# Elsewhere there is nothing to collect. Not find_spec("vllm"): that finds this folder.
collect_ignore_glob = [] if find_spec("vllm.v1") else ["*.py"]
