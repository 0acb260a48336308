-- What several scripts of the journal need; it stands before each of them.
-- ARGV: place, and what the script says.
local place = ARGV[1]
local DUE, AGE, BOUND = place .. 'due', place .. 'age', place .. 'bound'
local HOMES, COUNTS, DEAD = place .. 'homes', place .. 'n', place .. 'dead'
-- Of one claim or page, so that it can be sent within a budget.
local MOST_RECORDS, MOST_BYTES = 100, 1048576

local function clock()
  local time = redis.call('TIME')
  return time[1] * 1000000 + time[2]
end

local function stream(key) return place .. 's:' .. key end
local function facts(key) return place .. 'k:' .. key end

-- A Redis that is out of memory lets a script write that has begun with what takes none: else what
-- waits could never be claimed, and the memory never become free.
local function begin() redis.call('HDEL', COUNTS, '-') end

local function named(list)
  local found = {}
  for index = 1, #list, 2 do found[list[index]] = list[index + 1] end
  return found
end

-- What is known of a key. What is no hash is not of the journal's making, and stands in its way.
local function known(key)
  local list = redis.pcall('HGETALL', facts(key))
  if list.err then
    redis.call('UNLINK', facts(key))
    return {}
  end
  return named(list)
end

-- Whether something that lasts for a lease has not ended. An end that is further away is of a clock
-- that was set back since; within a second lease nobody loses anything by a small step.
local function lasts(ends, lease, now)
  ends = tonumber(ends) or 0
  return ends > now and ends <= now + 2 * (tonumber(lease) or 0)
end

local function is_held(state, now) return state.token and lasts(state.ends, state.lease, now) end

local function has(ids, seq) return string.find(ids or '', ' ' .. seq .. ':', 1, true) end

-- The record of a stream's entry; nil if it cannot be one.
local function record_of(entry)
  local record, digits = named(entry[2]), string.match(entry[1], '^(%d+)%-0$')
  if not (digits and #digits <= 16 and tonumber(digits) < 2 ^ 53) then return nil end
  record.seq = digits
  return record.w and record.d and record
end

local function add(key, record)
  local seq = record.seq
  return redis.pcall('XADD', stream(key), seq .. '-0', 'w', record.w, 'c', record.c or '0', 'h',
    record.h or '', 'a', record.a or seq, 'd', record.d)
end

-- Visit the entries of a stream until a visit says false; what is wrong with it, or nothing. They
-- are read one by one: any may be large, and what is not needed then takes its time as well.
local function walk(name, from, to, visit)
  local page = redis.pcall('XRANGE', name, from, to, 'COUNT', 1)
  if page.err then return page.err end
  while page[1] and visit(page[1]) ~= false do
    -- Nothing is behind the greatest id, which Redis calls an error.
    page = redis.pcall('XRANGE', name, '(' .. page[1][1], to, 'COUNT', 1)
  end
  return nil
end

-- Keep something that is no record among the dead letters: it has no data.
local function set_aside(key, id, why, now)
  redis.call('XADD', DEAD, '*', 'k', key, 'q', string.match(id, '^%d+') or '0', 'n', '0', 'f', now,
    'l', now, 'e', 'this cannot be read: ' .. string.sub(why, 1, 900))
  redis.call('HINCRBY', facts(key), 'dead', 1)
end

-- Build the stream of a key anew: without what cannot be read, and with a record at its old place.
-- Nothing can be put before what a stream has, so that all of it has to be moved.
local function rebuild(key, now, letter)
  local old = place .. 'm:' .. key
  known(key)
  if redis.call('EXISTS', stream(key)) == 1 then redis.call('RENAME', stream(key), old) end
  local why = walk(old, '-', '+', function(entry)
    local record = record_of(entry)
    if letter and record and tonumber(letter.seq) < tonumber(record.seq) then
      add(key, letter)
      letter = nil
    end
    if not record or type(add(key, record)) == 'table' then
      set_aside(key, entry[1], table.concat(entry[2], ' '), now)
    end
  end)
  if why then set_aside(key, '0', why, now) end
  redis.call('UNLINK', old)
  if letter then add(key, letter) end
end

-- The oldest records of a key, as many as there is room for but at least one; whether these are
-- all, and their bytes. Nil if one cannot be read.
local function oldest(key, room)
  local records, size, is_readable = {}, 0, true
  local why = walk(stream(key), '-', '+', function(entry)
    local record = record_of(entry)
    is_readable = record ~= nil
    if not record or (records[1] and size + #record.d > room) then return false end
    records[#records + 1], size = record, size + #record.d
    return #records < MOST_RECORDS and size < room
  end)
  if why or not is_readable then return nil end
  return records, #records == redis.call('XLEN', stream(key)), size
end

local function count(records, bytes)
  redis.call('HINCRBY', COUNTS, 'pending', records)
  redis.call('HINCRBY', COUNTS, 'bytes', bytes)
end

-- Forget what was superseded while it was claimed, when its claim has ended.
local function forget_gone(key, state)
  local removed, bytes = 0, 0
  for seq, size in string.gmatch(state.gone and state.ids or '', ' (%d+):(%d+)') do
    -- After the end of the claim a newer one may have taken its place.
    if has(state.gone, seq) and redis.pcall('XDEL', stream(key), seq .. '-0') == 1 then
      removed, bytes = removed + 1, bytes + size
      redis.call('HDEL', facts(key), 'f' .. seq)
    end
  end
  if removed > 0 then count(0 - removed, 0 - bytes) end
end

-- Let nothing be left of a claim.
local function let_go(key)
  redis.call('HDEL', facts(key), 'token', 'ends', 'lease', 'ids', 'gone')
end

-- Claim a key that is free; the claim as it is told, how many records it has, and their bytes. The
-- caller lets it be due when the claim ends.
local function take(key, state, token, now, lease, room)
  forget_gone(key, state)
  local records, is_whole, size = oldest(key, room)
  if not records then
    rebuild(key, now)
    records, is_whole, size = oldest(key, room)
  end
  local ids, told = {}, {}
  for index, record in ipairs(records) do
    local seq = record.seq
    ids[index] = ' ' .. seq .. ':' .. #record.d
    told[index] = {
      seq, record.w, record.c or '0', record.h or '', record.d, state['f' .. seq] or ''
    }
  end
  if state.gone then redis.call('HDEL', facts(key), 'gone') end
  redis.call('HSET', facts(key), 'token', token, 'ends', now + lease, 'lease', lease, 'ids',
    table.concat(ids))
  if records[1] then redis.call('ZADD', AGE, tonumber(records[1].a) or records[1].seq, key) end
  return {key, token, is_whole and 1 or 0, told}, #records, size
end

-- Let a key that has no record be as if it had never been; only its dead letters are remembered.
local function clear(key, now)
  local state = known(key)
  redis.call('UNLINK', stream(key))
  redis.call('ZREM', AGE, key)
  redis.call('HDEL', BOUND, key)
  if is_held(state, now) then return end
  redis.call('ZREM', DUE, key)
  if state.dead then
    for name in pairs(state) do
      if name ~= 'dead' and not string.find(name, '^[xy]') then
        redis.call('HDEL', facts(key), name)
      end
    end
  else
    redis.call('UNLINK', facts(key))
  end
end

-- Note what is now the oldest record of a key; whether there is one.
local function tidy(key, now)
  local first = redis.call('XRANGE', stream(key), '-', '+', 'COUNT', 1)[1]
  if not first then
    clear(key, now)
    -- Records that others have put in were never counted: here the count is right again.
    if redis.call('EXISTS', DUE) == 0 then
      redis.call('HDEL', COUNTS, 'pending', 'bytes', 'wait')
    end
    return false
  end
  local record = named(first[2])
  redis.call('ZADD', AGE, tonumber(record.a) or string.match(first[1], '^%d+'), key)
  if (record.h or '') == '' then
    redis.call('HDEL', BOUND, key)
  else
    redis.call('HSET', BOUND, key, record.h)
  end
  return true
end

-- Whether a newer value than that of a dead letter was accepted, or written by a holder of its key:
-- one of its writer, or one that stands for all writers'.
local function is_superseded(letter)
  local writer, seq = letter.w or '', tonumber(letter.q) or 0
  local newer = redis.pcall('HMGET', facts(letter.k or ''), 'x' .. writer, 'y' .. writer, 'y')
  local function is_after(index) return (tonumber(newer[index]) or 0) > seq end
  return is_after(1) or (letter.c == '1' and (is_after(2) or is_after(3)))
end

-- One dead letter of a key less.
local function forget_letter(key)
  if redis.call('HINCRBY', facts(key), 'dead', -1) <= 0 then
    redis.call('HDEL', facts(key), 'dead')
  end
end

