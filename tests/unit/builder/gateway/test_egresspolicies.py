"""Versions of egress policies in the gateway's database."""

from __future__ import annotations

import sqlite3

import pytest

from offload_builder.egress.policy import reading
from offload_builder.gateway import egresspolicies
from offload_builder.gateway.egresspolicies import POOL, EgressPolicies
from offload_builder.gateway.store import Store
from offload_core.errors import ConfigError, NotFoundError, UsageError

POLICY = 'posture = "allowlist"\nprojects_may_allow = "public"\n'
OWN = '[[rule]]\nid = "a"\nallow = ["a.example"]\n'


@pytest.fixture
async def policies(tmp_path):
    async with Store(f"sqlite:///{tmp_path / 'g.sqlite'}") as store:
        yield EgressPolicies(store)


async def apply(policies: EgressPolicies, text: str, scope: str = POOL, **options: object) -> int:
    applied = await policies.apply(scope, text, file="p.toml", author="ann", **options)
    return applied.version


async def test_without_a_policy_the_posture_is_open(policies):
    merged, version = await policies.merged("shop")
    assert (merged.policy.version, version) == (0, 0)
    assert (await policies.get(POOL)).policy().posture is merged.policy.posture


async def test_what_holds_is_read_once_until_it_changes(policies):
    await apply(policies, POLICY)
    first, _ = await policies.merged("shop")
    assert (await policies.merged("shop"))[0] is first
    assert await apply(policies, OWN, "shop") == 1
    second, version = await policies.merged("shop")
    assert (version, [rule.id for rule in second.policy.rules]) == (1, ["a"])
    other, version = await policies.merged("other")
    assert (version, other.policy.rules) == (0, ())
    await apply(policies, 'posture = "open"\n')
    third, version = await policies.merged("shop")
    assert (version, third.policy.version) == (1, 2)
    # Of many projects only the last ones are kept.
    for number in range(egresspolicies.MAX_KNOWN):
        await policies.merged(f"p{number}")
    again, _ = await policies.merged("shop")
    assert again is not third
    assert again == third


async def test_every_version_is_kept_with_its_author(policies):
    assert await apply(policies, POLICY, note="first\nline") == 1
    assert await apply(policies, POLICY + "#", expected=1) == 2
    found = await policies.versions(POOL)
    assert [(item.version, item.author, item.text) for item in found] == [
        (2, "ann", POLICY + "#"),
        (1, "ann", POLICY),
    ]
    assert "\n" not in found[1].note
    assert (await policies.get(POOL, 1)).text == POLICY
    with pytest.raises(NotFoundError, match="has no version 9"):
        await policies.get(POOL, 9)


async def test_what_is_the_same_or_a_trial_is_no_version(policies):
    await apply(policies, POLICY)
    assert await apply(policies, POLICY) == 1
    assert await apply(policies, POLICY + "#", dry_run=True) == 1
    assert await policies.versions_now() == {POOL: 1}


async def test_who_is_overtaken_is_told(policies):
    await apply(policies, POLICY)
    with pytest.raises(UsageError, match="the pool has version 1 of its policy by now"):
        await apply(policies, POLICY + "#", expected=7)


async def test_an_earlier_version_comes_back_with_rules_that_have_expired(policies, monkeypatch):
    text = POLICY + OWN + "expires = 2001-01-01\n"
    with pytest.raises(ConfigError, match="expired on 2001-01-01"):
        await apply(policies, text)
    with monkeypatch.context() as patch:
        patch.setattr(reading._Reader, "_check", lambda *_, **__: None)
        await apply(policies, text)
    await apply(policies, POLICY)
    applied = await policies.rollback(POOL, 1, author="eve")
    newest = (await policies.versions(POOL))[0]
    assert (applied.version, newest.text, newest.author) == (3, text, "eve")
    assert newest.note == "version 1 again"
    assert (await policies.rollback(POOL, 0, author="eve")).version == 4


async def test_a_stricter_pool_leaves_rules_of_projects_out_and_says_so(policies):
    await apply(policies, POLICY)
    await apply(policies, OWN, "shop")
    applied = await policies.apply(
        POOL, POLICY.replace("public", "nothing"), file="p.toml", author="ann"
    )
    (warning,) = applied.warnings
    assert str(warning).startswith('p.toml:1: warning: project shop: the rule "a" allows a.example')
    merged, version = await policies.merged("shop")
    assert (merged.policy.rules, version) == ((), 1)
    with pytest.raises(ConfigError, match="does not let projects allow it"):
        await apply(policies, OWN + "#", "shop")


async def test_a_stored_policy_that_cannot_be_read_does_not_keep_a_better_one_out(
    policies, tmp_path
):
    await apply(policies, POLICY)
    database = sqlite3.connect(tmp_path / "g.sqlite")
    with database:
        database.execute("UPDATE egress_policies SET text = 'posture = 1'")
    database.close()
    with pytest.raises(ConfigError, match="posture must be"):
        await policies.merged()
    assert await apply(policies, POLICY) == 2
    assert (await policies.merged())[0].policy.version == 2


async def test_policies_that_nodes_could_not_get_in_one_message_are_refused(policies, monkeypatch):
    monkeypatch.setattr(egresspolicies, "MAX_ALL_BYTES", 60)
    await apply(policies, POLICY)
    with pytest.raises(ConfigError, match="together"):
        await apply(policies, OWN, "shop")
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        await apply(policies, "#" * (1 << 20) + "\n" + POLICY)
