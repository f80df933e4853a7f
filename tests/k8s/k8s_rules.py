"""What a schema does not know about our manifests: each rule yields what is wrong, in words."""

from collections.abc import Callable, Iterator
from typing import Any

import k8s_rules_jobs as of_jobs
import k8s_rules_nodes as of_nodes
import k8s_rules_pods as of_pods
import k8s_rules_safety as of_safety
from k8s_manifests import Document
from k8s_parts import jobs, pod_specs

Rule = Callable[[Any], Iterator[str]]

JOB_RULES: tuple[Rule, ...] = (
    of_jobs.exit_codes_go_the_way_of_the_table,
    of_jobs.the_failure_policy_is_one_that_the_server_takes,
    of_jobs.the_job_knows_its_grace_period,
    of_jobs.every_job_has_a_last_bound,
    of_jobs.a_job_is_one_run_that_starts_when_it_is_applied,
    of_jobs.selectors_select_what_is_meant,
    of_nodes.pods_of_a_run_are_numbered_and_the_first_one_decides,
)
POD_RULES: tuple[Rule, ...] = (
    of_pods.the_command_line_is_known,
    of_pods.the_variables_are_known,
    of_pods.the_outcome_is_where_kubernetes_looks_for_it,
    of_pods.volumes_and_mounts_agree,
    of_pods.what_is_written_lands_on_a_volume,
    of_pods.requests_and_limits_agree,
    of_pods.volumes_fit_into_the_limits,
    of_nodes.each_process_has_a_gpu_and_threads_of_its_own,
    of_nodes.variables_are_defined_before_they_are_used,
    of_safety.pods_keep_to_the_restricted_profile,
    of_safety.no_pod_has_a_token_or_can_change_its_image,
    of_safety.a_node_can_have_what_is_asked_of_it,
    of_safety.the_user_is_the_image_s,
    of_safety.the_image_is_always_the_same,
)
WHOLE_RULES: tuple[Rule, ...] = (
    of_jobs.a_single_job_is_tidied_up_by_its_ttl,
    of_jobs.a_cronjob_never_overlaps_or_piles_up,
    of_pods.no_secret_stands_in_the_manifests,
    of_pods.the_recipe_is_right_and_where_the_arguments_say,
    of_pods.what_is_named_is_made,
    of_nodes.a_subdomain_has_its_service,
    of_nodes.where_the_network_is_closed_pods_of_a_run_reach_each_other,
    of_safety.a_recipe_never_changes_under_a_job,
    of_safety.what_the_server_fills_in_is_written_out,
    of_safety.service_accounts_give_no_token_away,
    of_safety.objects_carry_names_and_labels_that_the_server_takes,
)
RULES = (*JOB_RULES, *POD_RULES, *WHOLE_RULES)


def complaints(documents: list[Document]) -> list[str]:
    """Everything that is wrong with what one `kubectl apply` sends."""
    return [wrong for rule in RULES for wrong in heard(rule, documents)]


def heard(rule: Rule, documents: list[Document]) -> list[str]:
    """What one rule says of it."""
    if rule in WHOLE_RULES:
        return list(rule(documents))
    parts = jobs(documents) if rule in JOB_RULES else pod_specs(documents)
    return [wrong for part in parts for wrong in rule(part)]
