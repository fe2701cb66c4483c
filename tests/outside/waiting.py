"""THE ONE TABLE of what other parts of minray still owe Ray's surface.  To be emptied as they come; nothing else to edit.

tests/test_as_ray_surface.py expects each of these names to be missing, and tests/test_outside.py each of these programs
to fail: whoever adds one has to take it out here.
"""

NAMES = {
    "job_config.JobConfig": "runtime environments",
    "runtime_env.RuntimeEnv": "runtime environments",
    "util.placement_group": "placement groups",
    "util.remove_placement_group": "placement groups",
    "util.placement_group_table": "placement groups",
    "util.get_placement_group": "placement groups",
    "util.get_current_placement_group": "placement groups",
    "util.placement_group.PlacementGroup": "placement groups",
    "util.placement_group.get_current_placement_group": "placement groups",
    "util.placement_group.validate_placement_group": "placement groups",
    "util.placement_group.VALID_PLACEMENT_GROUP_STRATEGIES": "placement groups",
    "util.scheduling_strategies.PlacementGroupSchedulingStrategy": "placement groups",
    "util.scheduling_strategies.NodeAffinitySchedulingStrategy": "placement groups",
    "util.scheduling_strategies.NodeLabelSchedulingStrategy": "placement groups",
    "util.state.list_placement_groups": "placement groups",
    "util.state.get_placement_group": "placement groups",
    "runtime_context.RuntimeContext.get_placement_group_id": "placement groups",
    "runtime_context.RuntimeContext.is_canceled": "cancellation of asyncio actors",
    "runtime_context.RuntimeContext.runtime_env": "runtime environments",
    "ObjectRefGenerator": "generators",
    "DynamicObjectRefGenerator": "generators",
}
"""Name below ``ray`` -> what it waits for."""

PROGRAMS = {
    "environments.py": "runtime environments",
    "generators.py": "generators",
    "placement.py": "placement groups",
    "signal_actor.py": "asyncio actors",
}
"""File in tests/outside/programs -> what it waits for."""

LIBRARIES = {
    "modin_frame.py": "asyncio actors, runtime environments",
    "xgboost_ray_train.py": "placement groups",
}
"""File in tests/outside/libraries -> what it waits for."""
