"""moto with what it lacks of a real store: of several conditional writes to one key at once one wins.

As it comes it looks at the condition and then writes, in as many threads as there are requests.
"""

import io
import threading

from moto import server


class OneAtATime(server.DomainDispatcherApplication):
    """Requests arrive side by side, and are answered one after another."""

    _turn = threading.Lock()

    def __call__(self, environ, start_response):
        if length := int(environ.get("CONTENT_LENGTH") or 0):
            environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(length))
        with self._turn:
            return super().__call__(environ, start_response)


if __name__ == "__main__":
    server.DomainDispatcherApplication = OneAtATime
    server.main()
