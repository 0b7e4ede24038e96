"""A lean HTTP/2 and gRPC for BuildKit's sockets, made for many small messages.

grpcio spends about 160 microseconds of CPU on each message of a stream. A build context of
20,000 files is 60,000 messages, so the session tunnel has its own implementation, which packs
whatever waits into full DATA frames. Bottom up:

    frames       RFC 9113 frames
    headers      header blocks: HPACK, CONTINUATION
    stream       one stream: byte queues with flow control in both directions
    connection   one connection, client or server, over any byte pipe
    messages     gRPC: message framing, status, metadata
    client       gRPC calls over a unix socket
    server       gRPC services inside a connection
"""
