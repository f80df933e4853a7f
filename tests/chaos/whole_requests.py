"""ministack with what it lacks of a real store: of a request whose sender was killed halfway nothing is stored.

As it comes it takes what has arrived, be it nothing, for the whole object; and keeps the connection for a minute more.
"""

from hypercorn.asyncio.tcp_server import TCPServer
from ministack import app

read_data = TCPServer._read_data


async def read_data_and_leave(connection: TCPServer) -> None:
    """In the place of hypercorn's own: when the other end is gone and all is done, nothing is waited for."""
    await read_data(connection)
    await connection.idle_task.stop()


async def read_whole_body(receive, method, headers) -> bytes:
    """In the place of ministack's own."""
    body, more = (
        b"",
        bool(headers.get("content-length") or headers.get("transfer-encoding") or method in ("PUT", "POST")),
    )
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionResetError("the sender went away")
        body += message.get("body", b"")
        more = message.get("more_body", False)
    if len(body) != int(headers.get("content-length") or len(body)):
        raise ConnectionResetError("the sender went away")
    return app._decode_aws_chunked_body(body, headers)


if __name__ == "__main__":
    app._read_request_body = read_whole_body
    TCPServer._read_data = read_data_and_leave
    app.main()
