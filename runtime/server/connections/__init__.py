"""Connections of the server: who is let in, and for how long a client may keep the server waiting.

Modules::

    limits       numbers of connections and seconds, with their defaults
    acceptor     accepts connections, makes room for new ones, waits while descriptors are short
    connection   uvicorn's HTTP/1.1 protocol with deadlines
    refusal      answers a connection that finds no room
"""

from __future__ import annotations
