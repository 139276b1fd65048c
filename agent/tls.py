"""TLS between agents: the three PEM files of [tls], as gRPC and the bulk plane want them.

Owns the contexts. Promises mutual TLS 1.3: who shows no certificate of the same authority is not
talked to, on either plane. Checks no node id in certificates yet: that, and making them, is the
security tooling's.
"""

import ssl
from pathlib import Path

import grpc

from everstep.agent.config import TlsOptions
from everstep.proto.errors import InvalidConfiguration


def server_context(options: TlsOptions) -> ssl.SSLContext | None:
    """For the bulk plane's listener; None without TLS.

    Raises:
        InvalidConfiguration: If a file cannot be used.
    """
    return _context(options, ssl.PROTOCOL_TLS_SERVER)


def client_context(options: TlsOptions) -> ssl.SSLContext | None:
    """For a stream to another agent; None without TLS.

    Raises:
        InvalidConfiguration: If a file cannot be used.
    """
    return _context(options, ssl.PROTOCOL_TLS_CLIENT)


def _context(options: TlsOptions, protocol: int) -> ssl.SSLContext | None:
    if options.certificate is None:
        return None
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # Agents are known by their authority: addresses in certificates would tie them to hosts.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_cert_chain(options.certificate, options.key)
        context.load_verify_locations(options.authority)
    except (OSError, ssl.SSLError) as error:
        raise InvalidConfiguration("tls", f"the files cannot be used ({error})") from error
    return context


def server_credentials(options: TlsOptions) -> grpc.ServerCredentials | None:
    """For the gRPC server; None without TLS.

    Raises:
        InvalidConfiguration: If a file cannot be read.
    """
    if options.certificate is None or options.key is None or options.authority is None:
        return None
    pair = [(_read(options.key), _read(options.certificate))]
    return grpc.ssl_server_credentials(
        pair, root_certificates=_read(options.authority), require_client_auth=True
    )


def channel_credentials(options: TlsOptions) -> grpc.ChannelCredentials | None:
    """For channels to other agents; None without TLS.

    Raises:
        InvalidConfiguration: If a file cannot be read.
    """
    if options.certificate is None or options.key is None or options.authority is None:
        return None
    return grpc.ssl_channel_credentials(
        _read(options.authority), _read(options.key), _read(options.certificate)
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidConfiguration("tls", f"{path} cannot be read ({error.strerror})") from error
