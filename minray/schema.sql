-- Made by `python -m minray.schema` from minray/schema.py; do not edit.
CREATE TABLE "tasks" (
   "no" INTEGER PRIMARY KEY,
   "task_id" BLOB,
   "parent_no" INTEGER,
   "options_no" INTEGER,
   "actor_no" INTEGER,
   "state" INTEGER,
   "attempt" INTEGER,
   "worker_no" INTEGER,
   "submitted_us" INTEGER,
   "started_us" INTEGER,
   "finished_us" INTEGER,
   "args" BLOB,
   "deps" BLOB,
   "result_bytes" INTEGER,
   "error" TEXT,
   "checksum" INTEGER
);
CREATE TABLE "options" (
   "no" INTEGER PRIMARY KEY,
   "function_no" INTEGER,
   "name" TEXT,
   "kind" INTEGER,
   "num_returns" INTEGER,
   "resources" TEXT,
   "max_retries" INTEGER,
   "other" TEXT,
   "checksum" INTEGER
);
CREATE TABLE "functions" (
   "no" INTEGER PRIMARY KEY,
   "function_id" BLOB,
   "name" TEXT,
   "module" TEXT,
   "pickled" BLOB,
   "source" TEXT,
   "checksum" INTEGER
);
CREATE TABLE "actors" (
   "no" INTEGER PRIMARY KEY,
   "actor_id" BLOB,
   "options_no" INTEGER,
   "class_name" TEXT,
   "name" TEXT,
   "namespace" TEXT,
   "state" INTEGER,
   "worker_no" INTEGER,
   "pid" INTEGER,
   "restarts" INTEGER,
   "max_restarts" INTEGER,
   "detached" INTEGER,
   "created_us" INTEGER,
   "died_us" INTEGER,
   "death_cause" TEXT,
   "checkpoints" INTEGER,
   "unrecoverable" TEXT,
   "checksum" INTEGER
);
CREATE TABLE "workers" (
   "no" INTEGER PRIMARY KEY,
   "worker_id" BLOB,
   "pid" INTEGER,
   "state" INTEGER,
   "started_us" INTEGER,
   "died_us" INTEGER,
   "exit_reason" TEXT,
   "actor_no" INTEGER,
   "checksum" INTEGER
);
CREATE TABLE "objects" (
   "no" INTEGER PRIMARY KEY,
   "object_id" BLOB,
   "task_no" INTEGER,
   "state" INTEGER,
   "size_bytes" INTEGER,
   "location" INTEGER,
   "created_us" INTEGER,
   "freed_us" INTEGER,
   "checksum" INTEGER
);
CREATE TABLE "jobs" (
   "no" INTEGER PRIMARY KEY,
   "job_id" BLOB,
   "name" TEXT,
   "entrypoint" TEXT,
   "driver_pid" INTEGER,
   "state" INTEGER,
   "started_us" INTEGER,
   "finished_us" INTEGER,
   "minray_version" TEXT,
   "python_version" TEXT,
   "namespace" TEXT,
   "resources" TEXT,
   "checksum" INTEGER
);
CREATE TABLE "nodes" (
   "no" INTEGER PRIMARY KEY,
   "node_id" BLOB,
   "host" TEXT,
   "state" INTEGER,
   "resources" TEXT,
   "object_store_bytes" INTEGER,
   "labels" TEXT,
   "checksum" INTEGER
);
CREATE TABLE "events" (
   "no" INTEGER PRIMARY KEY,
   "time_us" INTEGER,
   "kind" TEXT,
   "subject" TEXT,
   "message" TEXT,
   "checksum" INTEGER
);
CREATE TABLE "task_totals" (
   "options_no" INTEGER,
   "state" INTEGER,
   "tasks" INTEGER,
   "run_us" INTEGER,
   "longest_us" INTEGER,
   "checksum" INTEGER,
   PRIMARY KEY ("options_no", "state")
);
CREATE TABLE "object_totals" (
   "location" INTEGER,
   "state" INTEGER,
   "objects" INTEGER,
   "size_bytes" INTEGER,
   "checksum" INTEGER,
   PRIMARY KEY ("location", "state")
);
CREATE TABLE "placement_groups" (
   "no" INTEGER PRIMARY KEY,
   "group_id" BLOB,
   "name" TEXT,
   "strategy" TEXT,
   "bundles" TEXT,
   "state" INTEGER,
   "detached" INTEGER,
   "requested_us" INTEGER,
   "placed_us" INTEGER,
   "removed_us" INTEGER,
   "reason" TEXT,
   "checksum" INTEGER
);
CREATE VIEW "task_view" AS SELECT t.no, nullif(lower(hex(t.task_id)), '') task_id, t.attempt attempt_number, o.name,
  CASE t.state WHEN 0 THEN 'PENDING_ARGS_AVAIL' WHEN 1 THEN 'PENDING_NODE_ASSIGNMENT' WHEN 2 THEN 'SUBMITTED_TO_WORKER' WHEN 3 THEN 'RUNNING' WHEN 4 THEN 'FINISHED' WHEN 5 THEN 'FAILED' END state, (SELECT nullif(lower(hex(job_id)), '') FROM jobs LIMIT 1) job_id, nullif(lower(hex(a.actor_id)), '') actor_id,
  CASE o.kind WHEN 0 THEN 'NORMAL_TASK' WHEN 1 THEN 'ACTOR_CREATION_TASK' WHEN 2 THEN 'ACTOR_TASK' END type, CASE o.kind WHEN 0 THEN coalesce(f.name, o.name) ELSE o.name END func_or_class_name,
  coalesce(nullif(lower(hex(p.task_id)), ''), (SELECT nullif(lower(hex(job_id)), '') FROM jobs LIMIT 1)) parent_task_id, (SELECT nullif(lower(hex(node_id)), '') FROM nodes LIMIT 1) node_id,
  nullif(lower(hex(w.worker_id)), '') worker_id, w.pid worker_pid,
  CASE WHEN instr(t.error, ':') THEN substr(t.error, 1, instr(t.error, ':') - 1) ELSE t.error END error_type,
  o.resources required_resources, t.submitted_us / 1000 creation_time_ms, t.started_us / 1000 start_time_ms,
  t.finished_us / 1000 end_time_ms, t.finished_us - t.started_us run_us, t.error error_message,
  t.result_bytes, o.max_retries, f.module
FROM tasks t LEFT JOIN options o ON o.no = t.options_no LEFT JOIN functions f ON f.no = o.function_no
  LEFT JOIN actors a ON a.no = t.actor_no LEFT JOIN workers w ON w.no = t.worker_no
  LEFT JOIN tasks p ON p.no = t.parent_no;
CREATE VIEW "actor_view" AS SELECT a.no, nullif(lower(hex(a.actor_id)), '') actor_id, a.class_name, CASE a.state WHEN 0 THEN 'DEPENDENCIES_UNREADY' WHEN 1 THEN 'PENDING_CREATION' WHEN 2 THEN 'ALIVE' WHEN 3 THEN 'RESTARTING' WHEN 4 THEN 'DEAD' END state,
  (SELECT nullif(lower(hex(job_id)), '') FROM jobs LIMIT 1) job_id, a.name, (SELECT nullif(lower(hex(node_id)), '') FROM nodes LIMIT 1) node_id, a.pid, a.namespace ray_namespace, a.restarts num_restarts,
  a.max_restarts, a.detached is_detached, a.death_cause, o.resources required_resources,
  nullif(lower(hex(w.worker_id)), '') worker_id, a.created_us / 1000 start_time_ms, a.died_us / 1000 end_time_ms,
  a.checkpoints, a.unrecoverable
FROM actors a LEFT JOIN options o ON o.no = a.options_no LEFT JOIN workers w ON w.no = a.worker_no;
CREATE VIEW "worker_view" AS SELECT w.no, nullif(lower(hex(w.worker_id)), '') worker_id, w.state != 2 is_alive,
  'WORKER' worker_type, CASE w.state WHEN 0 THEN 'STARTING' WHEN 1 THEN 'ALIVE' WHEN 2 THEN 'DEAD' END state, (SELECT nullif(lower(hex(node_id)), '') FROM nodes LIMIT 1) node_id,
  (SELECT host FROM nodes LIMIT 1) ip, w.pid, nullif(lower(hex(a.actor_id)), '') actor_id, w.exit_reason exit_detail,
  w.started_us / 1000 start_time_ms, w.died_us / 1000 end_time_ms
FROM workers w LEFT JOIN actors a ON a.no = w.actor_no;
CREATE VIEW "object_view" AS SELECT b.no, nullif(lower(hex(b.object_id)), '') object_id, b.size_bytes object_size,
  CASE b.state WHEN 0 THEN 'PENDING' WHEN 1 THEN 'READY' WHEN 2 THEN 'FREED' WHEN 3 THEN 'LOST' END state, CASE b.location WHEN 0 THEN 'inline' WHEN 1 THEN 'arena' WHEN 2 THEN 'spilled' END location,
  CASE WHEN hex(substr(b.object_id, 13, 1)) >= '80' THEN 'put' ELSE 'return' END made_by,
  coalesce(nullif(lower(hex(t.task_id)), ''), (SELECT nullif(lower(hex(job_id)), '') FROM jobs LIMIT 1)) task_id, o.name task_name, (SELECT nullif(lower(hex(job_id)), '') FROM jobs LIMIT 1) job_id,
  b.created_us / 1000 creation_time_ms, b.freed_us / 1000 end_time_ms
FROM objects b LEFT JOIN tasks t ON t.no = b.task_no LEFT JOIN options o ON o.no = t.options_no;
CREATE VIEW "placement_group_view" AS SELECT no, nullif(lower(hex(group_id)), '') placement_group_id, name, (SELECT nullif(lower(hex(job_id)), '') FROM jobs LIMIT 1) creator_job_id,
  CASE state WHEN 0 THEN 'PENDING' WHEN 1 THEN 'CREATED' WHEN 2 THEN 'REMOVED' WHEN 3 THEN 'INFEASIBLE' END state, strategy, bundles, detached is_detached, reason,
  requested_us / 1000 start_time_ms, placed_us / 1000 placed_time_ms, removed_us / 1000 end_time_ms
FROM placement_groups;
CREATE VIEW "job_view" AS SELECT no, nullif(lower(hex(job_id)), '') job_id, 'DRIVER' type, name, CASE state WHEN 0 THEN 'RUNNING' WHEN 1 THEN 'SUCCEEDED' WHEN 2 THEN 'FAILED' END status,
  entrypoint, driver_pid, started_us / 1000 start_time, finished_us / 1000 end_time, namespace,
  minray_version, python_version, resources FROM jobs;
CREATE VIEW "node_view" AS SELECT no, nullif(lower(hex(node_id)), '') node_id, host node_ip, no = 1 is_head_node,
  CASE state WHEN 0 THEN 'ALIVE' WHEN 1 THEN 'DEAD' END state, host node_name, resources resources_total,
  object_store_bytes, labels FROM nodes;
CREATE VIEW "event_view" AS SELECT no, strftime('%Y-%m-%d %H:%M:%f', time_us / 1e6, 'unixepoch', 'localtime') time, kind, subject, message, time_us FROM events;
CREATE VIEW "function_view" AS SELECT CASE o.kind WHEN 0 THEN coalesce(f.name, o.name) ELSE o.name END func_or_class_name, CASE o.kind WHEN 0 THEN 'NORMAL_TASK' WHEN 1 THEN 'ACTOR_CREATION_TASK' WHEN 2 THEN 'ACTOR_TASK' END type,
  CASE c.state WHEN 0 THEN 'PENDING_ARGS_AVAIL' WHEN 1 THEN 'PENDING_NODE_ASSIGNMENT' WHEN 2 THEN 'SUBMITTED_TO_WORKER' WHEN 3 THEN 'RUNNING' WHEN 4 THEN 'FINISHED' WHEN 5 THEN 'FAILED' END state, sum(c.tasks) tasks,
  coalesce(sum(c.run_us), 0) run_us, max(c.longest_us) longest_us
FROM (SELECT options_no, state, count(*) tasks, sum(finished_us - started_us) run_us,
    max(finished_us - started_us) longest_us FROM tasks GROUP BY 1, 2
  UNION ALL SELECT options_no, state, tasks, run_us, longest_us FROM task_totals) c
  LEFT JOIN options o ON o.no = c.options_no LEFT JOIN functions f ON f.no = o.function_no
GROUP BY 1, 2, 3;
PRAGMA user_version = 3;
