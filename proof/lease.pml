/* The lease of a guard, as a model for Spin. `python3 dev.py model` checks it; docs/proof.md explains it.
 *
 * One user, one store with a history, and the threads of one guard. Every thread repeats, for ever and in
 * any order: the fast path, the slow path (a sync if the lease is over, then a load if there is no row),
 * and a sync. Clock ticks at any moment, any number of times. The store makes EVENTS changes or
 * restores at any moment. The names are those of src/ipguard/guard: `deadline`, `position`, `row`,
 * `ahead`, `apply`, `remember`.
 *
 * What is asserted depends on the configuration:
 *
 * configuration staleness     -DMAX_STALENESS=2
 * configuration order         -DORDER -DMONOTONIC -DMAX_STALENESS=1
 * configuration preload       -DPRELOAD -DMAX_STALENESS=1
 * configuration preload_order -DPRELOAD -DORDER -DMONOTONIC -DMAX_STALENESS=1
 *
 * staleness: an answer rests on a policy that was the store's less than MAX_STALENESS ticks ago.
 * order: an answer rests on no older state of the store than its call may expect: the one that the last
 *     sync before the call has applied, and, with `at_least`, the one at the call. As long as no backup is
 *     restored, it rests on no older policy than any answer that was given before the call.
 * preload: as staleness, for a guard that preloads: one thread logs in and syncs, the other is its refresher,
 *     which syncs, reads snapshots, and reads unknown users again.
 * preload_order: as order, for such a guard.
 *
 * The switches. Each breaks the guard in one way, and Spin must find an error in the configuration named.
 *
 * switch FRESH_DEADLINE        staleness       1  The fast path reads the deadline after the look-up.
 * switch SLOW_FRESH_DEADLINE   staleness       1  The slow path compares the clock with a deadline read last.
 * switch NO_LAST_TEST          staleness       1  The slow path answers a row without testing the deadline.
 * switch DEADLINE_BEFORE_DROP  staleness       2  A sync moves the deadline before it drops the row.
 * switch POSITION_BEFORE_DROP  order           2  A sync moves the position before it drops the row.
 * switch NOT_DROPPED           staleness       2  A sync keeps the row of a user that the store names.
 * switch LEASE_FROM_END        staleness       2  The lease is counted from the end of the read.
 * switch DEADLINE_GOES_BACK    staleness       2  A slow sync moves the deadline back.
 * switch REVISION_GOES_BACK    order           2  A read from before another sync is applied all the same.
 * switch OLDER_READ_EXTENDS    staleness       2  A read whose head is below the revision extends the lease.
 * switch SYNC_JOINS            order           2  A sync waits for a read that began before it, and makes none.
 * switch STALE_FILL            staleness       3  A policy is remembered whatever the revision is by then.
 * switch OVERTAKEN_KEPT        order           3  A row is remembered after a younger load of the same user began.
 * switch AHEAD_REMEMBERED      staleness       3  A policy read ahead is remembered after a sync was applied.
 * switch AHEAD_KEPT            staleness       3  A sync keeps a row that was read ahead of the position.
 * switch OTHER_HISTORY_KEPT    staleness       3  A policy of a history that was lost is remembered.
 * switch OTHER_HISTORY_ANSWERS order           3  A policy of a history that was lost answers a later call.
 * switch LATE_LOAD             staleness       3  A load that took longer than MAX_STALENESS answers.
 * switch JOINER_COUNTS_ANEW    staleness       3  A call that joins a load counts its age from its own start.
 * switch JOINER_TAKES_OLDER    order           3  A call takes a policy from below the revision it noted.
 * switch JOINER_TAKES_AHEAD    order           3  A call takes a policy read ahead before a sync that it follows.
 * switch REVISION_AFTER_ROW    order           3  The slow path reads the revision after it found the row.
 * switch AT_LEAST_IGNORED      order           3  The slow path does not compare the revision with `at_least`.
 * switch UNRESTRICTED_KEPT     staleness       4  A sync keeps the row of an unrestricted user that the store names.
 * switch NO_TOKEN              staleness       6  The store finds a revision again without comparing tokens.
 * switch RESET_KEEPS_ROW       staleness       6  A RESET moves the position and keeps the row.
 * switch STANDBY_ANSWERS       staleness       7  A store that does not know the last changes renews the lease.
 * switch OTHER_SNAPSHOT        preload         8  A snapshot of another revision than the table's is swapped in.
 * switch CHANGED_NOT_MARKED    preload         8  A user who changes while the snapshot is read is not marked.
 * switch ABSENT_TOO_EARLY      preload         8  A user without a row is unrestricted before the table is complete.
 * switch RESET_KEEPS_SNAPSHOT  preload         8  A RESET does not end the snapshot that is being read.
 * switch RESET_KEEPS_TABLE     preload         8  A RESET drops the rows of a preloaded table, which stays complete.
 * switch EVERYBODY_KEPT        preload         8  A change of everybody drops no rows.
 * switch DROPPED_NOT_MARKED    preload         8  A sync drops the preloaded row of a user instead of marking it.
 * switch AHEAD_NOT_MARKED      preload_order   8  A user gets the row of a snapshot, although it was read ahead of it.
 * switch REFRESH_AFTER_SYNC    preload         8  A user is read again, and put in the table that has moved on.
 * switch REFRESH_AHEAD         preload         8  A user read again gets a row that was read ahead, and is not noted.
 * switch REFRESH_OTHER         preload_order   8  A user read again gets a row in a table that was emptied.
 * switch REFRESH_OLDER         preload_order   8  A user read again gets an older row than a login was answered by.
 * switch OUTAGE_EXTENDS        staleness      10  A sync that fails renews the lease.
 * switch OUTAGE_ANSWERS        staleness      10  A login during an outage is answered by the row.
 * switch SLEEP_UNNOTICED       staleness      11  The machine sleeps, its clock stands still, and the lease goes on.
 * switch LATE_FIRST_READ       staleness      12  A first read, which names nobody, is applied after another sync.
 *
 * Three things make the search small enough to be complete, and leave no behaviour out:
 * - A moment is kept as the number of ticks until it, 0 if it is past, and a tick counts all of them down. So
 *   `deadline > 0` stands for `monotonic() < deadline`, and MAX_STALENESS for `started + max_staleness`.
 * - `Position.history` and `Position.syncs` are only compared with values noted before. Here each load has a
 *   flag instead, which is set when the number changes: `diverged` and `synced`.
 * - Steps that no other thread can tell apart are one step (`d_step`). Variables are set to 0 after use.
 */

#ifndef MAX_STALENESS
#define MAX_STALENESS 2
#endif
#ifndef EVENTS
#define EVENTS 2
#endif
#define THREADS 2

#define EXPIRED 0
#define NONE 255
#define CURRENT 255
#define PENDING 254
#define OPEN 253
#define EVERYBODY 2

typedef Position { byte revision; byte token }

/* ------------------------------------------------------------------------------------ the store */

/* The history: for each revision up to `head` its token, whether it names the user (or EVERYBODY), and the user's
 * policy as of then. A policy is a number that is used once, so that each change makes another. */
byte head = 1;
byte token[EVENTS + 2];
byte named[EVENTS + 2];
byte policy[EVENTS + 2];

/* For the assertions. `era` counts the changes and restores. */
byte era = 0;
#ifdef ORDER
bool restored = false;
byte gone[EVENTS + 2];   /* by policy: the era since which it is not the store's; CURRENT if it is */
byte assured = 0;        /* the era of the last read that a sync has applied */
#ifdef MONOTONIC
byte born[EVENTS + 2];   /* by policy: the era since which it is the store's */
byte answered = 0;       /* the latest such era of an answer */
#define expected (answered > assured -> answered : assured)
#else
#define expected assured
#endif
#else
byte fresh[EVENTS + 2];  /* by policy: for how many ticks it may still be answered; CURRENT: it is the store's */
#endif

inline replace(before, after) {
  if
  :: before != after ->
#ifdef ORDER
     gone[before] = era;
     gone[after] = CURRENT;
#ifdef MONOTONIC
     born[after] = era
#endif
#else
     fresh[before] = MAX_STALENESS;
     fresh[after] = CURRENT
#endif
  :: else
  fi
}

proctype Store() {
  byte to;
  do
  :: atomic { /* a change, of this user or of another */
       era < EVENTS -> era++;
       if
       :: named[head + 1] = 1; policy[head + 1] = era + 1
#ifdef PRELOAD
       :: named[head + 1] = EVERYBODY; policy[head + 1] = era + 1
#endif
       :: policy[head + 1] = policy[head]
       fi;
       d_step {
         replace(policy[head], policy[head + 1]);
         head++;
         token[head] = era + 1
       }
     }
  :: atomic { /* a backup is restored, or a failover loses the last commits */
       era < EVENTS && head > 0 -> era++;
#ifdef ORDER
       restored = true;
#endif
       to = head - 1;
       do
       :: to > 0 -> to--
       :: break
       od;
       d_step {
         replace(policy[head], policy[to]);
         do
         :: head > to -> token[head] = 0; policy[head] = 0; named[head] = 0; head--
         :: else -> break
         od;
         to = 0
       }
     }
  :: era == EVENTS -> break
  od
}

/* ------------------------------------------------------------------------------------ the table */

bool lock = false;
byte row = NONE;        /* the user's row: a policy, PENDING, or NONE */
byte ahead = 0;         /* the revision of a row that was read ahead of the position */
#ifdef PRELOAD
bool complete = false;  /* whether NONE is unrestricted */
bool snapshot = false;  /* whether one is being read that is still valid */
bool changed = false;   /* whether the user is in Snapshot.changed */
bool stranger = false;  /* and in Snapshot.strangers */
#else
#define complete false
#endif
Position position;
byte deadline = EXPIRED;

/* What the threads hold; outside them, since the clock counts it down. */
typedef Load {
  byte leader;          /* the thread that reads; NONE: no load */
  byte expires;         /* started + max_staleness */
  Position position;    /* the table's when the load began */
  bool synced;          /* a sync was applied since */
  bool diverged;        /* the history has changed since */
  bool late;            /* the thread that waits has seen a sync since */
  bool done;
  byte row;             /* what was read */
  byte revision         /* and its revision */
}
Load load[THREADS];     /* by thread: the load that it leads or waits for */
byte in_flight = NONE;  /* the thread whose load can be joined */
byte until[THREADS];    /* the deadline that a call took */
byte expires[THREADS];  /* started + max_staleness of a sync */

#define counting(moment) (moment > 0 && moment < CURRENT)

inline count_down(moment) {
  if
  :: counting(moment) -> moment--
  :: else
  fi
}

/* Even policies are unrestricted, and of a user who is not registered; odd ones are restricted. */
#define unrestricted(version) (version == 0 || version == 2)

#ifndef ABSENT_TOO_EARLY
#define find (row == PENDING -> NONE : (row == NONE && complete -> OPEN : row))
#else
#define find (row == PENDING -> NONE : (row == NONE -> OPEN : row))
#endif

inline drop() {
#ifndef DROPPED_NOT_MARKED
  row = (complete -> PENDING : NONE);
#else
  row = NONE;
#endif
  ahead = (row == PENDING -> ahead : 0)
}

inline keep(version) { row = (complete && unrestricted(version) && ahead == 0 -> NONE : version) }

inline clear() {
#ifdef PRELOAD
#ifndef RESET_KEEPS_SNAPSHOT
  snapshot = false; changed = false; stranger = false;
#endif
#ifndef RESET_KEEPS_TABLE
  complete = false;
#endif
#endif
  row = NONE; ahead = 0
}

#ifdef ORDER
#define waiting false
#else
#define waiting (counting(fresh[0]) || counting(fresh[1]) || counting(fresh[2]) || counting(fresh[3]))
#endif

proctype Clock() {
  byte i;
end:
  do
  :: d_step {
       /* A tick that changes nothing is left out, so that Spin would notice a deadlock. */
       (deadline > 0 || until[0] > 0 || until[1] > 0 || expires[0] > 0 || expires[1] > 0 ||
        load[0].expires > 0 || load[1].expires > 0 || waiting) ->
       count_down(deadline);
       for (i : 0 .. THREADS - 1) {
         count_down(until[i]);
         count_down(expires[i]);
         count_down(load[i].expires)
       }
#ifndef ORDER
       for (i : 0 .. EVENTS + 1) { count_down(fresh[i]) }
#endif
       i = 0
     }
#ifdef SLEEP_UNNOTICED
  :: d_step { waiting -> for (i : 0 .. EVENTS + 1) { count_down(fresh[i]) } i = 0 }
#endif
  :: d_step { !lock && (complete -> unrestricted(row) : row != NONE) -> drop() } /* an eviction */
  od
}

#ifdef ORDER
#define true_of(version) (gone[version] > since)
#else
#define true_of(version) (fresh[version] > 0)
#endif

inline answer(version) {
#ifdef PRELOAD
  if
  :: version == OPEN -> assert(true_of(0) || true_of(2))
  :: else -> assert(true_of(version))
  fi;
#else
  assert(true_of(version));
#endif
#ifdef MONOTONIC
  if /* before a restore, no policy but 2 is unrestricted */
  :: !restored && born[(version == OPEN -> 2 : version)] > answered -> answered = born[(version == OPEN -> 2 : version)]
  :: else
  fi
#endif
}

#ifdef SYNC_JOINS
byte reads = 0; /* syncs in progress */
#endif

/* ------------------------------------------------------------------------------------ the lease */

inline move_deadline() {
#ifdef LEASE_FROM_END
  expires[me] = MAX_STALENESS;
#endif
#ifdef DEADLINE_GOES_BACK
  assert(expires[me] >= deadline);
  deadline = expires[me]
#else
  if
  :: expires[me] > deadline -> deadline = expires[me]
  :: else
  fi
#endif
}

inline move_position() {
  assert(reset || changes.revision >= position.revision);
  position.revision = changes.revision;
  position.token = changes.token;
  for (other : 0 .. THREADS - 1) { load[other].synced = load[other].leader != NONE }
  other = 0;
#ifdef ORDER
  if
  :: read_in > assured -> assured = read_in
  :: else
  fi
#endif
}

/* Lease.sync */
inline sync() {
  do
#ifdef SYNC_JOINS
  :: reads > 0 -> reads == 0; break
  :: else -> reads++;
#else
  ::
#endif
     d_step { cursor.revision = position.revision; cursor.token = position.token };
     expires[me] = MAX_STALENESS;
#ifdef OUTAGE_EXTENDS
     if
     :: d_step { move_deadline(); expires[me] = 0; cursor.revision = 0; cursor.token = 0 }; break
     :: skip
     fi;
#endif
     d_step { /* store.changes_since(cursor): one snapshot */
       changes.revision = head;
       changes.token = token[head];
#ifdef STANDBY_ANSWERS
       if
       :: cursor.token != NONE -> changes.revision = cursor.revision; changes.token = cursor.token
       :: else
       fi;
#endif
#ifdef ORDER
       read_in = era;
#endif
       if
       :: cursor.token == NONE
       :: cursor.token != NONE && (cursor.revision > head
#ifndef NO_TOKEN
          || token[cursor.revision] != cursor.token
#endif
          ) -> reset = true
       :: else ->
          for (other : cursor.revision + 1 .. changes.revision) { touched = touched | named[other] }
          other = 0
       fi;
       cursor.revision = 0
     };
     apply();
#ifdef SYNC_JOINS
     reads--;
#endif
     d_step {
       changes.revision = 0; changes.token = 0; touched = 0; reset = false; expires[me] = 0; read_in = 0;
       again = older && !enough; older = false; enough = false
     };
     if
     :: again -> again = false
     :: else -> break
     fi
  od
}

/* Drop what the store names, or everything if this is another history. */
inline drop_changed() {
  if
  :: reset || position.token == NONE ->
#ifndef RESET_KEEPS_ROW
     clear();
#endif
     for (other : 0 .. THREADS - 1) { load[other].diverged = load[other].leader != NONE }
     other = 0
  :: else
  fi;
  if
#ifdef EVERYBODY_KEPT
  :: !older && touched >= EVERYBODY
#else
  :: !older && touched >= EVERYBODY -> clear()
#endif
  :: !older && !reset && touched < EVERYBODY -> /* Table._drop_changed */
#if defined(PRELOAD) && !defined(CHANGED_NOT_MARKED)
     changed = changed || (snapshot && touched > 0);
#endif
     if
#ifdef UNRESTRICTED_KEPT
     :: touched > 0 && !unrestricted(row) -> drop()
#elif !defined(NOT_DROPPED)
     :: touched > 0 -> drop()
#endif
#ifndef AHEAD_KEPT
     :: ahead > 0 -> drop() /* the store cannot name a revision that it has lost */
#endif
     :: else
     fi;
     ahead = 0
  :: else
  fi
}

/* Table.apply, under the lock. Readers take no lock: they see the table between its two steps. */
inline apply() {
  d_step {
    !lock -> lock = true;
#ifndef REVISION_GOES_BACK
    /* Another sync has moved the position: this read has nothing to add, or must be made again. */
#ifdef LATE_FIRST_READ
    older = cursor.token != NONE && position.token != cursor.token && position.token != changes.token;
#else
    older = position.token != cursor.token && position.token != changes.token;
#endif
#endif
    enough = changes.revision < position.revision && !reset;
#if !defined(DEADLINE_BEFORE_DROP) && !defined(POSITION_BEFORE_DROP)
    drop_changed();
#endif
    cursor.token = 0
  };
#ifdef DEADLINE_BEFORE_DROP
  d_step { if :: !older -> move_deadline() :: else fi };
  d_step { drop_changed() };
#endif
#ifdef POSITION_BEFORE_DROP
  d_step { if :: !older -> move_position() :: else fi };
  d_step { drop_changed() };
#endif
  d_step {
    if
    :: !older ->
#ifndef POSITION_BEFORE_DROP
       move_position();
#endif
       move_deadline()
#ifdef OLDER_READ_EXTENDS
    :: older && enough -> move_deadline()
#endif
    :: else
    fi;
    lock = false
  }
}

/* -------------------------------------------------------------------------------- the fast path */

/* The first step is in Thread: it takes the deadline. */
inline fast_path() {
  found = find;
#ifdef FRESH_DEADLINE
  until[me] = deadline;
#endif
  d_step {
    if
    :: found != NONE && until[me] > 0 -> answer(found)
    :: else
    fi;
    found = 0; until[me] = 0; since = 0
  }
}

/* -------------------------------------------------------------------------------- the slow path */

/* Table.remember, under the lock */
#ifndef AHEAD_REMEMBERED
#define covered (load[me].revision <= load[me].position.revision || !load[me].synced) /* Position.covers */
#else
#define covered true
#endif

inline remember() {
  d_step {
    !lock;
    if
#ifndef OTHER_HISTORY_KEPT
    :: (!load[me].diverged
#else
    :: (true
#endif
#ifndef STALE_FILL
        && load[me].revision >= position.revision
#endif
#ifndef OVERTAKEN_KEPT
        && in_flight == me /* SingleFlight._read: no other read of this user has begun since */
#endif
       ) ->
       drop();
       if
       :: load[me].revision > load[me].position.revision -> /* Table._note_ahead */
#if defined(PRELOAD) && !defined(AHEAD_NOT_MARKED)
          changed = changed || (snapshot && !unrestricted(load[me].row));
          stranger = stranger || (snapshot && unrestricted(load[me].row));
#endif
          ahead = (covered || row == PENDING -> load[me].revision : ahead)
       :: else -> ahead = 0
       fi;
       if
       :: covered -> keep(load[me].row)
       :: else
       fi
    :: else
    fi
  }
}

/* SingleFlight.load, for a call that found no row: it leads a load, or joins the one in flight. */
inline begin_load() {
  if
  :: in_flight != NONE && load[in_flight].expires > 0 -> /* joinable */
     load[me].leader = in_flight;
     load[me].expires = load[in_flight].expires;
#ifdef JOINER_COUNTS_ANEW
     load[me].expires = MAX_STALENESS;
#endif
     load[me].position.revision = load[in_flight].position.revision;
     load[me].synced = load[in_flight].synced;
     load[me].diverged = load[in_flight].diverged;
  :: else ->
     load[me].leader = me;
     load[me].expires = MAX_STALENESS;
     load[me].position.revision = position.revision;
     for (other : 0 .. THREADS - 1) { load[other].late = load[other].late && load[other].leader != NONE }
     other = 0;
     in_flight = me
  fi
}

/* Answer by a load that has ended, if its policy is usable for this call; forget the load. */
inline end_load() {
#ifdef LATE_LOAD
  load[me].expires = MAX_STALENESS;
#endif
  if
  :: (load[me].done
#ifndef OTHER_HISTORY_ANSWERS
     && !load[me].diverged
#endif
#ifndef JOINER_TAKES_OLDER
     && load[me].revision >= revision
#endif
#ifndef JOINER_TAKES_AHEAD
     && (load[me].revision <= load[me].position.revision || !load[me].late)
#endif
     && load[me].expires > 0) -> answer(load[me].row)
  :: else
  fi;
  load[me].leader = NONE;
  load[me].expires = 0;
  load[me].position.revision = 0;
  load[me].synced = false;
  load[me].diverged = false;
  load[me].late = false;
  load[me].done = false;
  load[me].row = 0;
  load[me].revision = 0;
  revision = 0; since = 0
}

inline read_policy() {
  d_step { load[me].row = policy[head]; load[me].revision = head }; /* store.load_policy: one snapshot */
  remember();
  d_step {
    !lock;
    if
    :: in_flight == me -> in_flight = NONE
    :: else
    fi;
    for (other : 0 .. THREADS - 1) {
      if
      :: load[other].leader == me ->
         load[other].row = load[me].row;
         load[other].revision = load[me].revision;
         load[other].done = true
      :: else
      fi
    }
    other = 0;
    end_load()
  }
}

/* SlowPath.answer, after the lease was ensured */
inline slow_path() {
#ifdef REVISION_AFTER_ROW
  seen = find;
#endif
  atomic {
    if
    :: (deadline > 0
#ifndef AT_LEAST_IGNORED
       && position.revision >= wanted
#endif
       ) -> until[me] = deadline; revision = position.revision; wanted = 0;
       load[me].late = in_flight != NONE && load[in_flight].synced /* what Position.covers will compare */
    :: else ->
#ifdef OUTAGE_ANSWERS
       if
       :: find != NONE -> answer(find)
       :: else
       fi;
#endif
       wanted = 0; since = 0; break
    fi
  };
  atomic { /* Table.find; if there is no row, SingleFlight.load, which looks again under the lock */
#ifndef REVISION_AFTER_ROW
    seen = find;
#endif
    if
    :: seen != NONE -> found = seen; load[me].late = false
    :: !lock && find != NONE && position.revision >= revision ->
       found = find; until[me] = deadline; load[me].late = false
    :: !lock && (find == NONE || position.revision < revision) -> found = NONE; until[me] = 0; begin_load()
    fi;
    seen = 0
  };
  if
  :: found != NONE ->
     d_step {
#ifdef SLOW_FRESH_DEADLINE
       until[me] = deadline;
#endif
       if
#ifndef NO_LAST_TEST
       :: until[me] > 0 -> answer(found)
#else
       :: true -> answer(found)
#endif
       :: else
       fi;
       found = 0; until[me] = 0; since = 0; revision = 0
     }
  :: found == NONE && load[me].leader == me -> found = 0; read_policy()
  :: else -> found = 0;
     if
     :: d_step { load[me].done -> end_load() }
     :: d_step { !load[me].done -> end_load() } /* the caller has waited for long enough */
     fi
  fi
}

/* ----------------------------------------------------------------------------------- preloading */

#ifdef PRELOAD
/* Preload._read: begin_snapshot, load_all_policies, swap_snapshot */
inline fill() {
  d_step { !lock; snapshot = true; revision = position.revision };
  d_step { seen = (unrestricted(policy[head]) -> NONE : policy[head]); again = head != revision };
#ifdef OTHER_SNAPSHOT
  again = false;
#endif
  d_step {
    !lock;
    if
    :: !again && snapshot ->
       seen = (changed || (stranger && seen != NONE) -> PENDING : seen);
       clear(); row = seen; complete = true
    :: else
    fi;
    snapshot = false; changed = false; stranger = false; seen = 0; again = false; revision = 0
  }
}

/* SingleFlight.read_again, Table.refresh */
inline read_again() {
  d_step { load[me].leader = me; load[me].position.revision = position.revision };
  d_step { load[me].row = policy[head]; load[me].revision = head };
  d_step {
    !lock;
    if
    :: (true
#ifndef REFRESH_OTHER
        && row == PENDING
#endif
#ifndef REFRESH_OLDER
        && ahead == 0
#endif
#ifndef REFRESH_AFTER_SYNC
        && !load[me].diverged && load[me].position.revision == position.revision
#ifndef REFRESH_AHEAD
        && load[me].revision == position.revision
#endif
#endif
       ) ->
       drop(); keep(load[me].row)
    :: else
    fi;
    load[me].leader = NONE;
    load[me].position.revision = 0; load[me].synced = false; load[me].diverged = false;
    load[me].row = 0; load[me].revision = 0
  }
}
#endif

/* ---------------------------------------------------------------------------------- the threads */

#ifdef PRELOAD
#define logs_in (me == 0)
#else
#define logs_in true
#endif

proctype Thread(byte me) {
  Position cursor, changes;
  byte since, read_in, touched, wanted, found, seen, revision, other;
  bool slow, reset, older, enough, again;
end:
  do
#ifdef PRELOAD
  :: !logs_in && !complete -> fill()
  :: !logs_in && complete && row == PENDING -> read_again()
#endif
  :: d_step {
       logs_in && deadline > 0 -> until[me] = deadline;
#ifdef ORDER
       since = expected
#endif
     };
     fast_path()
  :: atomic {
       if
       :: logs_in -> slow = true
#ifdef ORDER
          ; since = expected
       :: logs_in && !restored && era > 0 -> slow = true; wanted = head; since = era /* at_least */
       :: since = (restored -> 0 : era) /* Guard.sync */
#else
       :: skip
#endif
       fi
     };
     if
     :: !slow || deadline == 0 || position.revision < wanted -> sync() /* Lease.ensure, or Guard.sync */
     :: slow /* the lease holds, or SlowPath.recall, which does not sync */
     fi;
#ifdef ORDER
     atomic {
       if
       :: !slow -> assert(restored || assured >= since); since = 0 /* the sync has seen what was before it */
       :: else
       fi
     };
#endif
     do
     :: slow -> slow = false; slow_path()
     :: else -> break
     od
  od
}

init {
  atomic {
    token[1] = 1;
    named[1] = 1;
    policy[1] = 1;
#ifdef ORDER
    gone[1] = CURRENT;
#else
    fresh[1] = CURRENT;
#endif
    position.token = NONE;
    load[0].leader = NONE;
    load[1].leader = NONE;
    run Store();
    run Clock();
    run Thread(0);
    run Thread(1)
  }
}
