"""The lock and the commit protocol on a real Ceph, which keeps conditions, and on a real Swift, which does not."""

import pytest
from artifacts_contract import ArtifactsContract, PlainArtifactsContract
from lock_contract import LockContract, PlainLockContract

pytestmark = pytest.mark.stores


class TestCeph(LockContract, ArtifactsContract):
    @pytest.fixture
    def root(self, ceph_place):
        return ceph_place.root


class TestSwift(PlainLockContract, PlainArtifactsContract):
    @pytest.fixture
    def root(self, swift_place):
        return swift_place.root

    def test_the_probe_finds_that_conditions_are_not_kept(self, owners):
        assert not owners.conditional
