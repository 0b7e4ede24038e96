"""The resolver of a node: it answers the names that a project's policy allows, and no others.

    contract      what it asks of the firewall, and what it tells
    nameview      a policy as the resolver reads it: names, and what their addresses may be used for
    queries       a query's bytes, and the bytes of its answer
    answers       addresses and names that stand behind a name
    upstream      asking the servers of the node
    upstreams     which servers these are
    answercache   answers that are still good
    lookup        cache, equal questions and chains of names
    projectview   one project: verdict, lookup, firewall, answer
    listening     UDP and TCP
    dnssockets    where the router of the node listens for names
    service       all projects of a node
    metrics       counters

See docs/egress-names.md.
"""
