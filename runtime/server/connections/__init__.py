"""What strangers can use up: connections, the seconds that they keep the server waiting, the log.

Modules::

    limits       numbers of connections and seconds, with their defaults
    acceptor     accepts connections, makes room for new ones, waits while descriptors are short
    connection   uvicorn's HTTP/1.1 protocol with deadlines
    refusal      answers a connection that finds no room
    quiet_log    the log, which clients cannot flood
"""

from __future__ import annotations
