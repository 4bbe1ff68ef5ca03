"""`wrk` as a client: it sends the next request as soon as the last one is answered, and never pauses."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess

import numpy as np

__all__ = ["ask"]

SCRIPT = """
local file = io.open(os.getenv("WRK_BODY"), "rb")
wrk.method, wrk.body = "POST", file:read("*a")
wrk.headers["Inference-Header-Content-Length"] = os.getenv("WRK_HEADER")
wrk.headers["Content-Type"] = "application/octet-stream"
file:close()
local threads = {}
function setup(thread) table.insert(threads, thread) end
function init(args) answered, refused, others = 0, 0, 0 end
function response(status)
  if status == 200 then answered = answered + 1
  elseif status == 429 then refused = refused + 1
  else others = others + 1 end
end
function done(summary)
  local errors = summary.errors
  for _, thread in ipairs(threads) do
    for _, name in ipairs({"answered", "refused", "others"}) do print("=" .. name, thread:get(name)) end
  end
  print("=lost", errors.connect + errors.read + errors.write + errors.timeout)
end
"""


def ask(
    folder: pathlib.Path, url: str, model: str, x: np.ndarray, clients: int, seconds: float
) -> dict[int | str, int]:
    """How often each answer came: 200, 429, "others", or "lost" for connections that ended without one.

    Raises:
        RuntimeError: wrk did not run.
    """
    import tritonclient.http as triton

    given = triton.InferInput("x", list(x.shape), triton.np_to_triton_dtype(x.dtype))
    given.set_data_from_numpy(x)
    body, header = triton.InferenceServerClient.generate_request_body([given])
    (folder / "body").write_bytes(body)
    (folder / "wrk.lua").write_text(SCRIPT)
    command = ["wrk", "-t", "1", "-c", str(clients), "-d", f"{max(1, round(seconds))}s", "--timeout", "60s"]
    done = subprocess.run(
        [*command, "-s", folder / "wrk.lua", f"{url}/v2/models/{model}/infer"],
        env={**os.environ, "WRK_BODY": str(folder / "body"), "WRK_HEADER": str(header)},
        capture_output=True,
        text=True,
    )
    found: dict[int | str, int] = {}
    for name, count in re.findall(r"^=(\w+)\t(\d+)$", done.stdout, re.MULTILINE):
        key = {"answered": 200, "refused": 429}.get(name, name)
        found[key] = found.get(key, 0) + int(count)
    if done.returncode or not found:
        raise RuntimeError(f"wrk: {done.stdout}{done.stderr}")
    return {key: count for key, count in found.items() if count}
