"""``eoracc serve``: an OpenAI-compatible server for one artifact. Needs FastAPI and uvicorn.

Who calls whom, from the outside in::

    process      socket, signals, uvicorn
    middleware   request id, metrics, access log; API key, size and type of the body
    app          routes (FastAPI), errors in OpenAI's shape
    service      a checked request becomes a job      schemas, catalog, token_bytes
    replies      sends a job's answers, notices that the client is gone      responses
    jobs         from the engine's thread to the event loop      admission, metrics
"""

from __future__ import annotations
