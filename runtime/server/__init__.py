"""``eoracc serve``: an OpenAI-compatible server for one artifact. Needs FastAPI and uvicorn.

Modules in the order in which a request passes them, with those that they use on the right::

    process         socket, signals, uvicorn                    connections
    middleware      request id, metrics, access log; API key, size and type of the body
    app             routes (FastAPI), errors in OpenAI's shape  api/body, api/errors
    service         checks a request, makes a ServedRequest  api/schemas, catalog, text_threads
    replies         sends its answers until the client goes  api/responses
    served_request  from the engine's thread to the event loop  admission, metrics
"""

from __future__ import annotations
