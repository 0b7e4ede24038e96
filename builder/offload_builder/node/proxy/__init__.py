"""BuildKit's API for docker buildx, compose, bake, buildctl and others, project by project.

    server      the TLS port
    visitor     one connection: who it is, and what each call becomes
    builds      one build of a client: probe, queue, run, end
    relayedjob  the same build as the node's agent knows it
    policy      what a build may have, and how its requests are changed
    admission   what the gateway is asked
    relay       bytes between two HTTP/2 connections
    feed        progress on its way to clients
    records     disk usage, prune and history of a project

See docs/buildx.md.
"""
