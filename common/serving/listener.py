"""The socket of a server: this one's, and the arena's."""

import errno
import socket

from common.errors import UserError
from common.serving.options import ServerOptions


def listen(options: ServerOptions) -> socket.socket:
    """A socket that listens: a port in use is found before a model is loaded, and early clients wait."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((options.host, options.port))
        listener.listen()  # two may bind the same port
    except (OSError, UnicodeError) as error:
        listener.close()
        other = "--port" if getattr(error, "errno", None) in (errno.EADDRINUSE, errno.EACCES) else "--host"
        raise UserError(f"cannot listen on {options.host}:{options.port}: {error}. Choose another {other}") from None
    return listener


def address(listener: socket.socket) -> str:
    """`http://127.0.0.1:8000`."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
