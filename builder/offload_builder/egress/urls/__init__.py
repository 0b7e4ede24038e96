"""What a build fetches, by URL: checked before it happens, and listed afterwards.

    locations   where a source of a build lies
    urlpolicy   the policy of a project, asked about such places
    urlrecord   what a build reached and was refused, step by step
    buildurls   both for one build, as BuildKit's session asks

The firewall and the resolver hold whatever is missed here; see docs/egress-urls.md.
"""
